"""Sampling by seed on a platform without sgl_kernel.

SGLang hashes (seed, position, token) with MurmurHash3 and turns that into noise; on a CPU it takes
the hash from sgl_kernel. Here it is the same hash in tensor operations, so that a `sampling_seed`
gives the tokens that it gives elsewhere.
"""

from __future__ import annotations

import torch

__all__ = ["install", "murmur_hash32"]

_32_BITS = 0xFFFFFFFF


def install() -> None:
    """Fill SGLang's seams in this process. Idempotent."""
    from sglang.srt import batch_invariant_ops
    from sglang.srt.layers import sampler

    sampler.murmur_hash32 = murmur_hash32
    # Kernels that only a GPU has. Without them --enable-deterministic-inference means sampling by
    # seed; logits are the same to within the rounding of a matrix product.
    batch_invariant_ops.enable_batch_invariant_mode = lambda: None


def murmur_hash32(
    seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor
) -> torch.Tensor:
    """MurmurHash3_x86_32 of the 16 bytes (seed, position, column), little endian, for every pair.

    Source: Austin Appleby, MurmurHash3.cpp (public domain).

    Args:
        seed: [n], 64 bits each.
        positions: [n].
        col_indices: [m].

    Returns:
        [n, m], int64 from 0 to 2**32 - 1.
    """
    rows = seed.view(torch.int64).unsqueeze(1) if seed.dtype == torch.uint64 else seed.unsqueeze(1)
    state = torch.zeros_like(rows)
    for block in (rows & _32_BITS, rows >> 32 & _32_BITS, positions.unsqueeze(1), col_indices):
        state = _mix(state, block.to(torch.int64))
    return _finish(state ^ 16)


def _mix(state: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    block = _times(block, 0xCC9E2D51)
    block = _times(_rotate(block, 15), 0x1B873593)
    return _times(_rotate(state ^ block, 13), 5) + 0xE6546B64 & _32_BITS


def _finish(state: torch.Tensor) -> torch.Tensor:
    state = _times(state ^ state >> 16, 0x85EBCA6B)
    state = _times(state ^ state >> 13, 0xC2B2AE35)
    return state ^ state >> 16


def _times(value: torch.Tensor, factor: int) -> torch.Tensor:
    # The low 32 bits of a product of two 32-bit numbers; a wrap of int64 leaves them alone.
    return value * factor & _32_BITS


def _rotate(value: torch.Tensor, bits: int) -> torch.Tensor:
    return (value << bits | value >> 32 - bits) & _32_BITS
