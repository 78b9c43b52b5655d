"""The arithmetic of an emulated model's tokens.

The checksum of a position is a sum over all tokens up to it, each mixed with its position, in 64
bits that wrap. So a chunk of a prompt needs the checksum before it and nothing else, and a whole
step is one cumulative sum.
"""

from __future__ import annotations

import torch

__all__ = ["checksums", "next_tokens"]


def checksums(
    tokens: torch.Tensor, positions: torch.Tensor, lengths: torch.Tensor, before: torch.Tensor
) -> torch.Tensor:
    """Checksums of consecutive positions of several requests.

    Args:
        tokens: [sum of lengths] ids, request after request.
        positions: [sum of lengths] of each token in its request.
        lengths: [requests] tokens of each, at least 1.
        before: [requests] int64, the checksum of the position before each's first; 0 at the start.

    Returns:
        [sum of lengths], int64.
    """
    terms = _mixed(tokens.long() * _TOKEN + positions.long() * _POSITION)
    sums = torch.cumsum(terms, 0)
    first = torch.cumsum(lengths, 0) - lengths
    offsets = before - sums[first] + terms[first]
    return sums + torch.repeat_interleave(offsets, lengths)


def next_tokens(sums: torch.Tensor, vocabulary: torch.Tensor) -> torch.Tensor:
    """The token of `vocabulary` (ids) that follows each of the checksums `sums`."""
    return vocabulary[_mixed(sums) % len(vocabulary)]


def _signed(constant: int) -> int:
    """An unsigned 64-bit number as the signed one of the same bits, which is torch's."""
    return constant - (1 << 64) if constant >> 63 else constant


_TOKEN = _signed(0x9E3779B97F4A7C15)  # odd, about half of its bits set: 2**64 over the golden ratio
_POSITION = _signed(0xC2B2AE3D27D4EB4F)
_MIX = _signed(0xD6E8FEB86659FD93)


def _mixed(values: torch.Tensor) -> torch.Tensor:
    values = (values ^ (values >> 32)) * _MIX
    return values ^ (values >> 29)
