"""How much KV is free: in one pool, or in two where layers have sliding windows.

A model with windows in some of its layers has a second pool for those. A token has a slot in each
until the window has passed it, and then in the first alone; so the second pool, which is smaller,
can be full while the first is not, and the other way round.
"""

from __future__ import annotations

import math

from conserve_sgl.checkpoint.host import UnifiedRadixCache, is_swa_req_ring

__all__ = ["KvPools"]


class KvPools:
    """What nobody holds of the KV pools, or the radix tree would give up at once.

    Args:
        tree: SGLang's; its allocator is that of the pools.
    """

    def __init__(self, tree: UnifiedRadixCache) -> None:
        self._tree = tree
        self._allocator = tree.token_to_kv_pool_allocator
        # A ring of every row's own is there as long as the row is.
        self._windows = tree.supports_swa() and not is_swa_req_ring(self._allocator)

    @property
    def free_tokens(self) -> int:
        """KV tokens of all layers, or of those without a window."""
        return self.unheld_tokens + self.cached_tokens

    @property
    def unheld_tokens(self) -> int:
        """Those of them that nobody holds."""
        if not self._windows:
            return self._allocator.available_size()
        return self._allocator.full_available_size()

    @property
    def cached_tokens(self) -> int:
        """Those of them that the radix tree alone holds."""
        return self._tree.full_evictable_size() if self._windows else self._tree.evictable_size()

    @property
    def free_window_tokens(self) -> float:
        """KV tokens of the layers with a window; without such a pool there is no end of them."""
        if not self._windows:
            return math.inf
        return self._allocator.swa_available_size() + self._tree.swa_evictable_size()
