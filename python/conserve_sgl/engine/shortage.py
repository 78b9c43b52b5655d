"""Offline prompts that found no KV, and need not be tried again in every step."""

from __future__ import annotations

__all__ = ["Shortage"]

_TRIES_EVERY = 8
"""Steps: what SGLang expects rows to need yet falls a little with every one of them."""


class Shortage:
    """Remembers how much KV was free when offline prompts did not find enough.

    To try costs the host a few milliseconds (prefixes are looked up, the needs of all rows summed
    up), and in a full pool nothing changes until a request ends.
    """

    def __init__(self) -> None:
        self._free_tokens: int | None = None
        self._steps = 0

    def note(self, free_tokens: int, *, found_no_kv: bool) -> None:
        """How a try ended, with so many tokens free beyond the reserve."""
        self._free_tokens = free_tokens if found_no_kv else None
        self._steps = 0

    @property
    def found_no_kv(self) -> bool:
        """How the last try ended."""
        return self._free_tokens is not None

    def lasts(self, free_tokens: int) -> bool:
        """Whether a try in this step, with so many tokens free, would end as the last one did."""
        if self._free_tokens is None or free_tokens > self._free_tokens:
            return False
        self._steps += 1
        return self._steps < _TRIES_EVERY
