"""Sampling by seed: the hash that decides."""

from __future__ import annotations

import random
import struct
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch

    from conserve_sgl.platform.sampling import murmur_hash32


def murmur3(data: bytes) -> int:
    """MurmurHash3_x86_32 with seed 0, as its author wrote it."""

    def rotate(x: int, r: int) -> int:
        return (x << r | x >> (32 - r)) & 0xFFFFFFFF

    def scramble(k: int) -> int:
        return rotate(k * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF

    h = 0
    whole = len(data) // 4 * 4
    for (k,) in struct.iter_unpack("<I", data[:whole]):
        h = (rotate(h ^ scramble(k), 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    if data[whole:]:
        h ^= scramble(int.from_bytes(data[whole:], "little"))
    h ^= len(data)
    h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return h ^ h >> 16


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0),
        (b"test", 0xBA6BD213),
        (b"Hello, world!", 0xC0363E43),
        (b"The quick brown fox jumps over the lazy dog", 0x2E4FF723),
    ],
)
def test_the_reference_is_murmur3(data, value):
    assert murmur3(data) == value


def test_the_hash_is_murmur3_of_seed_position_and_token():
    chance = random.Random(3)
    seeds = [0, 1, 2**31, 2**63 - 1, *(chance.getrandbits(63) for _ in range(4))]
    positions = [chance.randrange(2**17) for _ in seeds]
    tokens = [0, 1, 49151, *(chance.randrange(2**18) for _ in range(5))]
    hashes = murmur_hash32(
        torch.tensor(seeds).to(torch.uint64), torch.tensor(positions), torch.tensor(tokens)
    )
    assert hashes.tolist() == [
        [murmur3(struct.pack("<QII", seed, position, token)) for token in tokens]
        for seed, position in zip(seeds, positions, strict=True)
    ]
