"""Which prompts have a prefix in common."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from zlib import crc32

__all__ = ["PREFIX_BLOCK_TOKENS", "PREFIX_TOKENS", "prefix_key"]

PREFIX_BLOCK_TOKENS = 64
PREFIX_TOKENS = 4096


def prefix_key(tokens: Sequence[int], namespace: str = "") -> bytes:
    """A key that sorts prompts with a common prefix next to each other.

    Four bytes for each full block of PREFIX_BLOCK_TOKENS tokens, up to PREFIX_TOKENS; each is a
    checksum of all tokens up to the end of its block. A collision costs a cache hit, nothing else.

    Args:
        tokens: the prompt.
        namespace: prompts of different namespaces share nothing (SGLang's `extra_key`).
    """
    blocks = min(len(tokens), PREFIX_TOKENS) // PREFIX_BLOCK_TOKENS
    view = memoryview(array("q", tokens[: blocks * PREFIX_BLOCK_TOKENS])).cast("B")
    block_bytes = 8 * PREFIX_BLOCK_TOKENS
    checksum = crc32(namespace.encode())
    checksums = array("I")
    for start in range(0, len(view), block_bytes):
        checksum = crc32(view[start : start + block_bytes], checksum)
        checksums.append(checksum)
    return checksums.tobytes()
