"""The flags of a server on an emulated device, and `torch.cpu` where it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig

from conserve_sgl.errors import IncompatibleError
from conserve_sgl.platform.emulated.device import install
from conserve_sgl.platform.emulated.platform import CHUNKED_PREFILL_TOKENS, EmulatedPlatform
from conserve_sgl.platform.emulated.queue import DeviceQueue


def _resolved(**given: Any) -> SimpleNamespace:
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
        "enable_hierarchical_cache": False,
        "enable_lora": None,
        "lora_paths": None,
        "cuda_graph_config": CudaGraphConfig(
            decode=PhaseConfig(backend=Backend.FULL), prefill=PhaseConfig(backend=Backend.FULL)
        ),
        "json_model_override_args": "{}",
        "load_format": "auto",
        "tp_size": 1,
        "kv_cache_dtype": "auto",
    }
    args = SimpleNamespace(**flags | given)
    EmulatedPlatform().apply_server_args_defaults(args)
    return args


def test_the_model_is_a_small_one_without_weights() -> None:
    args = _resolved(json_model_override_args='{"max_position_embeddings": 9, "head_dim": 128}')

    overrides = json.loads(args.json_model_override_args)
    assert overrides["architectures"] == ["EmulatedForCausalLM"]
    assert (overrides["max_position_embeddings"], overrides["head_dim"]) == (9, 4)
    assert args.load_format == "dummy"


def test_chunks_are_a_gpu_s_unless_given() -> None:
    assert _resolved().chunked_prefill_size == CHUNKED_PREFILL_TOKENS
    assert _resolved(chunked_prefill_size=64).chunked_prefill_size == 64


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("tp_size", "tensor-parallel-size", 2),
        ("kv_cache_dtype", "kv-cache-dtype", "fp8_e5m2"),
        ("page_size", "page-size", 16),
        ("enable_lora", "enable-lora", True),
        ("speculative_algorithm", "speculative-algorithm", "NGRAM"),
    ],
)
def test_a_flag_that_cannot_work_is_refused_by_name(flag: str, name: str, value: Any) -> None:
    with pytest.raises(IncompatibleError, match=f"--{name} {value}"):
        _resolved(**{flag: value})


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[DeviceQueue]:
    """A device on a clock that only waiting moves, in the place of this process's CPU."""
    now_s = [0.0]

    def sleep(seconds: float) -> None:
        now_s[0] += seconds

    names = ("Stream", "Event", "StreamContext", "stream", "current_stream", "synchronize")
    for name in names:  # restored at the end
        monkeypatch.setattr(torch.cpu, name, getattr(torch.cpu, name))
    queue = DeviceQueue(lambda: now_s[0], sleep)
    install(queue)
    return queue


def test_torch_s_cpu_is_the_device_and_runs_behind(queue: DeviceQueue) -> None:
    module = torch.get_device_module("cpu")
    forward, copies = module.Stream(priority=0), module.Stream()
    with module.stream(forward):
        queue.compute(2.0)
        assert module.current_stream() is forward
    copies.wait_stream(forward)
    with module.StreamContext(copies):
        done = module.Event(enable_timing=True)
        done.record()

    assert not done.query()
    module.synchronize()
    assert queue.now_s() == 2.0
    assert done.query()
