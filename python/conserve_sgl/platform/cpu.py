"""The platform: what SGLang asks a device about itself, answered for a plain CPU.

SGLang makes the platform while `sglang.srt.utils` is being imported, so at module level only its
leaf modules can be imported here.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from sglang.srt.arg_groups.choices import (
    ATTENTION_BACKEND_CHOICES,
    add_attention_backend_choices,
    add_deterministic_attention_backend_choices,
    add_radix_supported_deterministic_attention_backend_choices,
)
from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from conserve_sgl.errors import IncompatibleError
from conserve_sgl.platform import NAME

__all__ = ["CHUNKED_PREFILL_TOKENS", "KV_POOL_TOKENS", "CpuPlatform", "require"]

KV_POOL_TOKENS = 131_072
"""Default size of the KV pool. SGLang's own default fills the memory, and HiCache twice again."""

CHUNKED_PREFILL_TOKENS = 1024
"""Default prefill chunk: about a second of a small model on a few cores."""

_ATTENTION_BACKENDS = (NAME, "torch_native")
_DRAFTS = "NGRAM"
_STATE_SPACE = ("Qwen3NextForCausalLM",)
"""Models with state-space layers whose kernels are in `delta_net.py`."""
# SGLang's defaults need kernels that exist on a GPU only, so they stand for "not given".
_HICACHE_IO_BACKENDS = ("kernel", "direct")
_HICACHE_LAYOUTS = ("page_first", "layer_first")
_LORA_BACKENDS = ("csgmv", "torch_native")


class CpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU without sgl_kernel: native forwards, eager mode, our attention backend, HiCache.

    An instance exists in every process of a server. Making one announces the attention backend to
    SGLang's flags; `init_backend` runs in processes that run a model.
    """

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def __init__(self) -> None:
        if NAME not in ATTENTION_BACKEND_CHOICES:
            add_attention_backend_choices([NAME])
            add_deterministic_attention_backend_choices([NAME])
            add_radix_supported_deterministic_attention_backend_choices([NAME])
            register_resolution_hook("handle_cpu_backends")(_choose_attention_backend)
            register_resolution_hook("handle_model_specific_adjustments")(_fit_to_model)
            register_resolution_hook("handle_speculative_decoding")(_keep_overlap)

    def get_device(self, device_id: int | None = None) -> str:  # noqa: ARG002  one CPU device
        """`"cpu"`; a string, since SGLang keeps it as the flag `--device`."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        """Our own backend, for every model; what it cannot serve it refuses at load."""
        return NAME

    def get_torch_profiler_activity_str(self) -> str:
        return "CPU"

    def get_torch_profiler_activity(self) -> torch.profiler.ProfilerActivity:
        return torch.profiler.ProfilerActivity.CPU

    def get_compile_backend(self, mode: str | None = None) -> str:  # noqa: ARG002
        """Eager: serving must not need a C++ compiler."""
        return "eager"

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """Drafts from n-grams alone: a model that drafts would need kernels for its trees."""
        return algorithm == _DRAFTS

    def get_speculative_worker_cls(self, algorithm: str) -> type:  # noqa: ARG002  there is one
        """Our own worker; SGLang's needs a compiler and kernels."""
        from conserve_sgl.platform.drafts import NgramWorker

        return NgramWorker

    def support_mamba_cache_extra_buffer(self) -> bool:
        """States of state-space layers are kept as they pass, so that such models overlap."""
        return True

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Default what a CPU needs; a flag that was given stays, or is refused if it cannot work.

        Args:
            server_args: SGLang's recorder of defaults: reads see what is decided so far,
                assignments become declarations.

        Raises:
            IncompatibleError: a flag asks for what this platform cannot do.
        """
        _refuse_unsupported(server_args)
        _default_sizes(server_args)
        _default_hicache(server_args)
        server_args.lora_backend = "torch_native"
        _disable_graphs(server_args)

    def init_backend(self) -> None:
        """Register what a model runs with: attention, drafts, experts, HiCache, adapters, sampling.

        Idempotent.
        """
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        from conserve_sgl.platform import drafts, experts, hicache, lora, sampling

        register_attention_backend(NAME)(_make_attention_backend)
        torch.get_device_module = _device_module
        drafts.install()
        experts.install()
        hicache.install()
        lora.install()
        sampling.install()

    def post_load_model(self, model: torch.nn.Module) -> None:
        """Refuse a model whose attention would come out wrong.

        Raises:
            IncompatibleError: an attention layer caps its logits.
        """
        from sglang.srt.layers.radix_attention import RadixAttention

        layers = (m for m in model.modules() if isinstance(m, RadixAttention))
        if any(layer.logit_cap for layer in layers):
            raise IncompatibleError(
                f"{type(model).__name__} caps its attention logits, which no attention backend "
                "of a plain CPU does"
            )


def _choose_attention_backend(server_args: Any, previous: Any) -> None:
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    # Runs around SGLang's own step for CPUs, which would choose intel_amx.
    if resolving_view(server_args).attention_backend is None:
        declare_resolution(server_args, f"platform:{NAME}", attention_backend=NAME)
    previous(server_args)


def _fit_to_model(server_args: Any, previous: Any) -> None:
    """Around SGLang's own adjustments to a model.

    gpt-oss it has on a list of attention backends, for their windows and sinks, which ours has too;
    and the experts of that in a kernel of a GPU's, unless told otherwise.

    Raises:
        IncompatibleError: the model's windows have a KV pool, and torch_native was asked for; or
            its state-space layers need a GPU.
    """
    from sglang.srt.arg_groups.model_override_base import attention_backends_of, model_config_of
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.mem_cache.kv_cache_builder import uses_ssm_state

    args, config = resolving_view(server_args), model_config_of(server_args)
    (arch, *_) = config.hf_config.architectures or [""]
    if config.is_hybrid_swa and "torch_native" in attention_backends_of(args):
        raise IncompatibleError(
            f"--attention-backend torch_native does not know the KV pool of the windows of {arch}: "
            f"use {NAME}, or --disable-hybrid-swa-memory"
        )
    if uses_ssm_state(config):
        _refuse_states(args, arch)
        # SGLang keeps what a convolution has seen in bfloat16, whatever the model is in.
        dtype = str(config.dtype).removeprefix("torch.")
        os.environ.setdefault("SGLANG_MAMBA_CONV_DTYPE", dtype)
    if arch != "GptOssForCausalLM" or args.attention_backend != NAME:
        previous(server_args)
        return
    runner = "triton" if args.moe_runner_backend == "auto" else args.moe_runner_backend
    source = f"platform:{NAME}"
    declare_resolution(
        server_args, source, attention_backend="intel_amx", moe_runner_backend=runner
    )
    previous(server_args)
    declare_resolution(server_args, source, attention_backend=NAME)


def _refuse_states(args: Any, arch: str) -> None:
    """
    Raises:
        IncompatibleError: the model's state-space layers, or one of the flags beside them, need a
            GPU.
    """
    if arch not in _STATE_SPACE:
        raise IncompatibleError(
            f"the state-space layers of {arch} are computed by kernels of a GPU; on a CPU there "
            f"are those of {', '.join(_STATE_SPACE)}"
        )
    for flag, given in (
        ("enable-hierarchical-cache", args.enable_hierarchical_cache),
        ("speculative-algorithm", args.speculative_algorithm is not None),
    ):
        if given:
            raise IncompatibleError(f"--{flag} beside the states of {arch} needs a GPU")


def _keep_overlap(server_args: Any, previous: Any) -> None:
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view

    # SGLang's own CPU worker does not overlap, so this step turns it off wherever a CPU drafts.
    chosen = resolving_view(server_args).disable_overlap_schedule
    previous(server_args)
    if resolving_view(server_args).disable_overlap_schedule is not chosen:
        declare_resolution(server_args, f"platform:{NAME}", disable_overlap_schedule=chosen)


_torch_device_module = torch.get_device_module


class _ModuleOfNoDevice:
    """torch's module of a device that it was built for and that is not there: the device of the
    layers that a model makes is the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_torch_device_module(), name)

    @staticmethod
    def current_device() -> str:
        return "cpu"


# torch.compile looks for what torch's own function, a cached one, wraps.
@functools.wraps(_torch_device_module.__wrapped__)
def _device_module(device: Any = None) -> Any:
    return _ModuleOfNoDevice() if device is None else _torch_device_module(device)


def _make_attention_backend(runner: Any) -> Any:
    from sglang.srt.configs.hybrid_arch import hybrid_gdn_config

    from conserve_sgl.platform import delta_net
    from conserve_sgl.platform.attention import CpuAttnBackend

    if hybrid_gdn_config(runner.model_config) is not None:
        delta_net.install()
    return CpuAttnBackend(runner)


def _refuse_unsupported(args: Any) -> None:
    for flag in ("attention_backend", "prefill_attention_backend", "decode_attention_backend"):
        require(flag, getattr(args, flag), (None, *_ATTENTION_BACKENDS))
    require("device", args.device, ("cpu",))
    require("page_size", args.page_size, (None, 1))
    require("speculative_algorithm", args.speculative_algorithm, (None, _DRAFTS))
    require("enable_torch_compile", args.enable_torch_compile, (False,))
    if args.enable_hierarchical_cache:
        require("hicache_io_backend", args.hicache_io_backend, _HICACHE_IO_BACKENDS)
        require("hicache_mem_layout", args.hicache_mem_layout, _HICACHE_LAYOUTS)
    if args.enable_lora or args.lora_paths:
        require("lora_backend", args.lora_backend, _LORA_BACKENDS)


def require(flag: str, value: Any, allowed: tuple) -> None:
    """
    Raises:
        IncompatibleError: `flag` has a value that is not one of `allowed`.
    """
    if value in allowed:
        return
    usable = ", ".join(str(a) for a in allowed if a)
    hint = f"use {usable}" if usable else "leave it out"
    raise IncompatibleError(
        f"--{flag.replace('_', '-')} {value} does not work on the platform {NAME}: {hint}"
    )


def _default_sizes(args: Any) -> None:
    if args.max_total_tokens is None and args.mem_fraction_static is None:
        args.max_total_tokens = KV_POOL_TOKENS
    if args.chunked_prefill_size is None:
        args.chunked_prefill_size = CHUNKED_PREFILL_TOKENS


def _default_hicache(args: Any) -> None:
    args.hicache_io_backend = "direct"
    args.hicache_mem_layout = "layer_first"


def _disable_graphs(args: Any) -> None:
    from sglang.srt.model_executor.cuda_graph_config import Backend, Phase, with_phase

    config = args.cuda_graph_config
    for phase in (Phase.DECODE, Phase.PREFILL):
        config = with_phase(config, phase, backend=Backend.DISABLED)
    args.cuda_graph_config = config
