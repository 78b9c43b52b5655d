"""Which KV HiCache copies to the host as soon as it is in the radix tree.

With `--hicache-write-policy write_through` that is all of it, and on a GPU a copy holds up the step
after it (docs/kv-checkpoints.md). KV of offline requests is copied at once only where that is
likely to save more than it takes; else when a second request finds it, as with SGLang's own
`write_through_selective`, or when its request gives way. KV of online requests is left to SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from conserve_sgl.checkpoint.host import (
    HiCacheController,
    InsertParams,
    InsertResult,
    UnifiedRadixCache,
)

__all__ = ["HostWrites"]

_AT_ONCE, _WHEN_SHARED = 1, 2
"""Hits after which SGLang writes a node: its `write_through`, and `write_through_selective`."""


class HostWrites:
    """Decides for each insertion into `tree`, from here on.

    Args:
        tree: a radix cache, with the policy `write_through` where it has a host.
        host: HiCache's controller; without one nothing is ever copied.
        is_offline: tells an offline request, or its insertion, by its priority.
        pays: whether copying all KV of offline requests does.
    """

    def __init__(
        self,
        tree: UnifiedRadixCache,
        host: HiCacheController | None,
        *,
        is_offline: Callable[[Any], bool],
        pays: Callable[[], bool],
    ) -> None:
        self._tree = tree
        self._is_offline = is_offline
        self._pays = pays
        self._decided: bool | None = None
        if host is not None:
            self._insert = tree.insert
            tree.insert = self.insert

    def insert(self, params: InsertParams) -> InsertResult:
        """`UnifiedRadixCache.insert`, which copies what it adds, or does not."""
        if not self._is_offline(params):
            return self._insert(params)
        at_once = self._pays() if self._decided is None else self._decided
        self._tree.write_through_threshold = _AT_ONCE if at_once else _WHEN_SHARED
        try:
            return self._insert(params)
        finally:
            self._tree.write_through_threshold = _AT_ONCE

    @contextmanager
    def decided(self, at_once: bool) -> Iterator[None]:
        """Within, what is inserted for offline requests is copied at once, or is not."""
        self._decided = at_once
        try:
            yield
        finally:
            self._decided = None
