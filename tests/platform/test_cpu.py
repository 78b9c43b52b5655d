"""The platform's defaults: what a flag that was not given becomes, and what is refused."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig
from sglang.srt.server_args import ServerArgs

from conserve_sgl.errors import IncompatibleError
from conserve_sgl.platform import NAME, experts
from conserve_sgl.platform.cpu import (
    CHUNKED_PREFILL_TOKENS,
    KV_POOL_TOKENS,
    CpuPlatform,
    _device_module,
    _fit_to_model,
)


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
        "enable_lora": True,
        "lora_paths": None,
        "lora_backend": "csgmv",
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
    assert args.lora_backend == "torch_native"
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
        ("lora_backend", "triton"),
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


def test_a_backend_for_adapters_does_not_matter_without_them() -> None:
    assert _resolved(lora_backend="triton", enable_lora=None)


def test_the_platform_announces_its_attention_backend_once() -> None:
    CpuPlatform(), CpuPlatform()
    assert ATTENTION_BACKEND_CHOICES.count(CpuPlatform().get_default_attention_backend()) == 1


def test_the_device_is_a_flag_and_a_torch_device() -> None:
    assert torch.device(CpuPlatform().get_device()).type == "cpu"


def _seen_by_sglang(monkeypatch: pytest.MonkeyPatch, arch: str, **flags: Any) -> tuple[str, str]:
    """The attention backend that SGLang's adjustments to a model see, and the one after them."""
    config = SimpleNamespace(
        hf_config=SimpleNamespace(architectures=[arch]),
        is_hybrid_swa=arch in ("GptOssForCausalLM", "MellumForCausalLM"),
        dtype=torch.float32,
    )
    monkeypatch.setattr(
        "sglang.srt.mem_cache.kv_cache_builder.uses_ssm_state",
        lambda _config: arch in ("Qwen3NextForCausalLM", "MambaForCausalLM"),
    )
    monkeypatch.setattr(
        "sglang.srt.arg_groups.model_override_base.model_config_of", lambda _args: config
    )
    args = ServerArgs(model_path="dummy", **{"attention_backend": NAME, **flags})
    seen = []
    _fit_to_model(args, lambda args: seen.append(resolving_view(args).attention_backend))
    return seen[0], resolving_view(args).attention_backend


def test_gpt_oss_is_served_although_sglang_does_not_list_our_backend(monkeypatch) -> None:
    assert _seen_by_sglang(monkeypatch, "GptOssForCausalLM") == ("intel_amx", NAME)
    assert _seen_by_sglang(monkeypatch, "MellumForCausalLM") == (NAME, NAME)


def test_torch_native_knows_no_pool_of_windows(monkeypatch) -> None:
    with pytest.raises(IncompatibleError, match="the windows of MellumForCausalLM"):
        _seen_by_sglang(monkeypatch, "MellumForCausalLM", attention_backend="torch_native")
    llama = _seen_by_sglang(monkeypatch, "LlamaForCausalLM", attention_backend="torch_native")
    assert llama == ("torch_native", "torch_native")


@pytest.mark.parametrize(
    ("arch", "flags", "said"),
    [
        ("MambaForCausalLM", {}, "layers of MambaForCausalLM are computed by kernels of a GPU"),
        (
            "Qwen3NextForCausalLM",
            {"enable_hierarchical_cache": True},
            "--enable-hierarchical-cache",
        ),
        ("Qwen3NextForCausalLM", {"speculative_algorithm": "NGRAM"}, "--speculative-algorithm"),
    ],
)
def test_states_that_need_a_gpu(monkeypatch, arch, flags, said) -> None:
    with pytest.raises(IncompatibleError, match=said):
        _seen_by_sglang(monkeypatch, arch, **flags)


@pytest.mark.parametrize(("is_set", "then"), [(None, "float32"), ("float16", "float16")])
def test_convolutions_keep_what_they_see_in_the_models_type(monkeypatch, is_set, then) -> None:
    monkeypatch.setenv("SGLANG_MAMBA_CONV_DTYPE", is_set or "")
    if is_set is None:
        monkeypatch.delenv("SGLANG_MAMBA_CONV_DTYPE")
    assert _seen_by_sglang(monkeypatch, "Qwen3NextForCausalLM") == (NAME, NAME)
    assert os.environ["SGLANG_MAMBA_CONV_DTYPE"] == then


def test_where_there_is_no_device_layers_are_made_for_the_cpu() -> None:
    module = _device_module()
    assert module.current_device() == "cpu"
    assert module.__name__ == torch.get_device_module().__name__
    assert _device_module("cpu") is torch.cpu
    torch_has = torch.get_device_module.__wrapped__
    assert _device_module.__wrapped__ is torch_has  # or torch.compile ends


def test_the_shared_expert_is_gated() -> None:
    hidden, weight = torch.randn(3, 5), torch.randn(5)
    shared, routed = torch.randn(3, 5), torch.randn(3, 5)
    gated = torch.sigmoid((hidden * weight).sum(-1, keepdim=True)) * shared
    out = routed.clone()
    experts.gate_shared(hidden, weight, shared, out, do_add=True)
    torch.testing.assert_close(out, routed + gated)
    experts.gate_shared(hidden, weight, shared, out, do_add=False)
    torch.testing.assert_close(out, gated)


def test_the_experts_of_gpt_oss_need_no_compiler(monkeypatch) -> None:
    from sglang.srt.layers.moe import fused_moe_native as native

    # Put back after the test what SGLang has.
    monkeypatch.setattr(native, "swiglu_gpt_oss_sigmoid_alpha", native.swiglu_gpt_oss_sigmoid_alpha)
    for _ in range(2):
        experts.install()
    gate, up = torch.tensor([3.0, 9.0]), torch.tensor([-9.0, 0.5])
    given = torch.stack((gate, up), -1).flatten()
    limited = gate.clamp(max=7.0)
    wanted = limited * torch.sigmoid(1.702 * limited) * (up.clamp(-7.0, 7.0) + 1)
    torch.testing.assert_close(native.swiglu_gpt_oss_sigmoid_alpha(given, 1.702, 7.0), wanted)
    assert not hasattr(native.swiglu_gpt_oss_sigmoid_alpha, "_torchdynamo_orig_callable")
