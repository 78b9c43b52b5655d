"""HiCache's host pool on a platform whose device memory is host memory.

SGLang pins the pool with the CUDA runtime and copies with kernels of sgl_kernel; neither exists
here, so both seams get plain memory and indexed copies. Only the io backend `direct` with the
layout `layer_first` is served.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

__all__ = ["install", "transfer_kv_direct"]

_RESERVE_SHARE = 0.1


def install() -> None:
    """Fill SGLang's seams in this process. Idempotent; call before a host pool is built."""
    from sglang.srt.mem_cache.pool_host import base, common, mha, mla

    common.ALLOC_MEMORY_FUNCS["cpu"] = _allocate
    mha.transfer_kv_direct = mla.transfer_kv_direct = transfer_kv_direct
    # SGLang keeps 10 GiB of host memory free, which suits a GPU server and stops a small machine;
    # it offers no flag for it.
    reserve_bytes = int(psutil.virtual_memory().total * _RESERVE_SHARE)
    base.HICACHE_HOST_MEMORY_RESERVE_BYTES = min(
        base.HICACHE_HOST_MEMORY_RESERVE_BYTES, reserve_bytes
    )


def transfer_kv_direct(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,  # noqa: ARG001  token indices arrive expanded, whatever the page
) -> None:
    """Copy KV rows between pools: `dst[dst_indices] = src[src_indices]` in every layer.

    Args:
        src_layers, dst_layers: equally many tensors, [tokens, ...] each; `dst_layers` is written.
        src_indices, dst_indices: one row per token, of equal length.
        page_size: tokens in a page, unused.
    """
    src_indices, dst_indices = src_indices.long(), dst_indices.long()
    for src, dst in zip(src_layers, dst_layers, strict=True):
        dst.index_copy_(0, dst_indices, src.index_select(0, src_indices))


def _allocate(dims, dtype, device, pin_memory, allocator, registration_granularity_bytes=None):  # noqa: ARG001
    return allocator.allocate(dims, dtype=dtype, device=device)
