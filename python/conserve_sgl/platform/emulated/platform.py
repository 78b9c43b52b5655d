"""The platform: a plain CPU whose forward pass is the time that it takes on another device.

SGLang makes the platform while `sglang.srt.utils` is being imported, so at module level only its
leaf modules can be imported here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import torch

from conserve_sgl.platform import NAME
from conserve_sgl.platform.cpu import CpuPlatform, require
from conserve_sgl.platform.emulated import sampling
from conserve_sgl.platform.emulated.device import install, the_device
from conserve_sgl.platform.hicache import transfer_kv_direct

logger = logging.getLogger(__name__)

__all__ = ["CHUNKED_PREFILL_TOKENS", "EmulatedPlatform"]

CHUNKED_PREFILL_TOKENS = 8192
"""Default prefill chunk: SGLang's on a GPU of 80 GB."""

# One KV head of the 8 bytes in which a token's checksum fits.
_GEOMETRY = {
    "architectures": ["EmulatedForCausalLM"],
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "torch_dtype": "bfloat16",
}


class EmulatedPlatform(CpuPlatform):
    """Serves any dense model's folder, of which only config and tokenizer are read."""

    device_name = "conserve_emulated"

    def get_device_name(self, device_id: int = 0) -> str:  # noqa: ARG002
        return the_device().name

    def kv_token_bytes(self) -> int:
        """Of the device's model; the pool itself is small."""
        return round(the_device().spec.kv_bytes_per_token)

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """As on a CPU; the model keeps its depth, its vocabulary and its context, nothing else.

        Raises:
            IncompatibleError: a flag asks for what this platform cannot do.
        """
        require("tensor_parallel_size", server_args.tp_size, (1,))
        require("enable_lora", server_args.enable_lora or bool(server_args.lora_paths), (False,))
        require("speculative_algorithm", server_args.speculative_algorithm, (None,))
        require("kv_cache_dtype", server_args.kv_cache_dtype, ("auto", "bfloat16", "bf16"))
        if server_args.chunked_prefill_size is None:
            server_args.chunked_prefill_size = CHUNKED_PREFILL_TOKENS
        super().apply_server_args_defaults(server_args)
        given = json.loads(server_args.json_model_override_args)
        server_args.json_model_override_args = json.dumps({**given, **_GEOMETRY})
        server_args.load_format = "dummy"

    def init_backend(self) -> None:
        from sglang.srt.layers.attention.attention_registry import register_attention_backend
        from sglang.srt.mem_cache.pool_host import mha

        super().init_backend()
        register_attention_backend(NAME)(_make_attention_backend)
        mha.transfer_kv_direct = _copy_in_time
        install(the_device().queue)

    def post_load_model(self, model: torch.nn.Module) -> None:  # noqa: ARG002  it has no attention
        sampling.install()
        logger.warning("the device is emulated: %s", the_device().name)


def _make_attention_backend(runner: Any) -> Any:
    from conserve_sgl.platform.emulated.model import NoAttention

    return NoAttention(runner)


def _copy_in_time(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """`transfer_kv_direct`, and as long as the real KV takes; keys and values of each layer."""
    transfer_kv_direct(src_layers, dst_layers, src_indices, dst_indices, page_size)
    device, layers = the_device(), len(src_layers) / 2
    # SGLang copies all layers at once to the host, and one after the other from it.
    device.copy(len(src_indices), layers, to_host=layers == device.spec.layers)
