"""The platform's defaults: what a flag that was not given becomes, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig

from conserve_sgl.errors import IncompatibleError
from conserve_sgl.platform.cpu import CHUNKED_PREFILL_TOKENS, KV_POOL_TOKENS, CpuPlatform


def _args(**given: Any) -> SimpleNamespace:
    flags: dict[str, Any] = {
        "attention_backend": None,
        "prefill_attention_backend": None,
        "decode_attention_backend": None,
        "device": "cpu",
        "page_size": None,
        "speculative_algorithm": None,
        "enable_torch_compile": False,
        "max_total_tokens": None,
        "mem_fraction_static": None,
        "chunked_prefill_size": None,
        "enable_hierarchical_cache": True,
        "hicache_io_backend": "kernel",
        "hicache_mem_layout": "page_first",
        "cuda_graph_config": CudaGraphConfig(
            decode=PhaseConfig(backend=Backend.FULL), prefill=PhaseConfig(backend=Backend.BREAKABLE)
        ),
    }
    return SimpleNamespace(**flags | given)


def _resolved(**given: Any) -> SimpleNamespace:
    args = _args(**given)
    CpuPlatform().apply_server_args_defaults(args)
    return args


def test_defaults() -> None:
    args = _resolved()
    assert args.max_total_tokens == KV_POOL_TOKENS
    assert args.chunked_prefill_size == CHUNKED_PREFILL_TOKENS
    assert (args.hicache_io_backend, args.hicache_mem_layout) == ("direct", "layer_first")
    graphs = args.cuda_graph_config
    assert graphs.decode.backend == graphs.prefill.backend == Backend.DISABLED


@pytest.mark.parametrize(
    ("flag", "value"), [("max_total_tokens", 4096), ("chunked_prefill_size", 64)]
)
def test_a_given_size_stays(flag: str, value: int) -> None:
    assert getattr(_resolved(**{flag: value}), flag) == value


def test_a_given_memory_fraction_sizes_the_pool() -> None:
    assert _resolved(mem_fraction_static=0.5).max_total_tokens is None


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("attention_backend", "flashinfer"),
        ("decode_attention_backend", "triton"),
        ("device", "cuda"),
        ("page_size", 16),
        ("speculative_algorithm", "EAGLE"),
        ("enable_torch_compile", True),
        ("hicache_io_backend", "kernel_ascend"),
        ("hicache_mem_layout", "page_head"),
    ],
)
def test_a_flag_that_cannot_work_is_refused_by_name(flag: str, value: Any) -> None:
    with pytest.raises(IncompatibleError, match=f"--{flag.replace('_', '-')} {value}"):
        _resolved(**{flag: value})


def test_drafts_come_from_n_grams() -> None:
    assert _resolved(speculative_algorithm="NGRAM")
    assert CpuPlatform().supports_speculative_algorithm("NGRAM")
    assert not CpuPlatform().supports_speculative_algorithm("STANDALONE")


def test_hicache_flags_do_not_matter_without_hicache() -> None:
    assert _resolved(hicache_mem_layout="page_head", enable_hierarchical_cache=False)


def test_the_platform_announces_its_attention_backend_once() -> None:
    CpuPlatform(), CpuPlatform()
    assert ATTENTION_BACKEND_CHOICES.count(CpuPlatform().get_default_attention_backend()) == 1


def test_the_device_is_a_flag_and_a_torch_device() -> None:
    assert torch.device(CpuPlatform().get_device()).type == "cpu"
