"""What requests that wait have on the host: kept there, and loaded before their turn.

A request that gave way may wait for minutes. Under the `priority` eviction of the radix cache its
host copy would be the first to go, before prefixes of online prompts that nobody asks for again;
so it is pinned, up to a share of the host pool.

    waiting    pinned on the host; on the device until somebody needs the room
    loading    its turn is near: the copy back runs beside the steps of others, locked by the tree
    admitted   its prefill finds all of it on the device; no longer pinned

A copy back that starts with the request's own prefill, as SGLang does it, holds that step up layer
by layer until the copy is done, and every row that decodes in it or after it: 8,000 tokens of an
8B model are 1 GB. Where nobody else runs it is the faster way, and is left to SGLang.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

from conserve_sgl.checkpoint.host import (
    DecLockRefParams,
    HiCacheController,
    NodeId,
    Req,
    ScheduleBatch,
    UnifiedRadixCache,
)

__all__ = ["HostCopies"]

_PINNED_SHARE = 0.5
_WORTH_LOADING_TOKENS = 64


class HostCopies:
    """Pins and loads the KV of waiting requests.

    Args:
        tree: the radix cache.
        host: HiCache's controller; without one there is nothing to pin or to load.
    """

    def __init__(self, tree: UnifiedRadixCache, host: HiCacheController | None) -> None:
        self._tree = tree
        self._host = host
        self._pins: dict[Req, tuple[NodeId, DecLockRefParams, int]] = {}
        self._pinned_tokens = 0
        self._most_pinned = 0 if host is None else int(host.mem_pool_host.size * _PINNED_SHARE)
        self._on_host: WeakKeyDictionary[Req, int] = WeakKeyDictionary()  # tokens, when last looked
        self._loads: WeakKeyDictionary[Req, NodeId] = WeakKeyDictionary()
        self._loading: list[NodeId] = []  # of the last load
        self._last_load = -1  # SGLang's number of it, for who has to wait for it
        self.loaded_ahead_tokens = 0

    @property
    def pinned_tokens(self) -> int:
        """Of waiting requests; prefixes that they share count once for each."""
        return self._pinned_tokens

    # ------------------------------------------------------------------- pinning

    def pin(self, req: Req) -> None:
        """Keep what the host has of `req`, which gives way and still locks its node."""
        tokens, node = req.kv.cache_protected_len, req.last_node
        full = self._pinned_tokens + tokens > self._most_pinned
        if self._host is None or req in self._pins or full or not self._tree.is_backuped(node):
            return
        params = self._tree.inc_host_lock_ref(node).to_dec_params()
        self._pins[req] = (node, params, tokens)
        self._pinned_tokens += tokens

    def forget(self, req: Req) -> None:
        """`req` waits no longer: it was admitted, or aborted. Idempotent."""
        self._loads.pop(req, None)
        self._on_host.pop(req, None)
        if (pin := self._pins.pop(req, None)) is not None:
            node, params, tokens = pin
            self._tree.dec_host_lock_ref(node, params)
            self._pinned_tokens -= tokens

    def clear(self) -> None:
        """The tree was emptied, and its locks with it."""
        self._pins.clear()
        self._loads.clear()
        self._on_host.clear()
        self._loading = []
        self._pinned_tokens = 0

    # ------------------------------------------------------------------- loading

    def load_ahead(self, reqs: list[Req], room_tokens: int) -> list[Req]:
        """Start to load what the host has of `reqs`, which gave way, as far as there is room.

        Each is loaded at most once, so that none waits for a load for ever.

        Args:
            reqs: in the order of their turns.
            room_tokens: KV tokens of the device that they may take, evictable ones included.

        Returns:
            Those that wait for a copy that runs. All others may be admitted now.
        """
        if self._host is None:
            return []
        busy = self._is_loading()
        waits, started = [], []
        for req in reqs:
            if req in self._loads:
                if self._loads[req] in self._tree.ongoing_load_back:
                    waits.append(req)
                continue
            tokens = self._tokens_to_load(req, room_tokens)
            if tokens < _WORTH_LOADING_TOKENS:
                continue
            if busy:  # with the copy of others; its own comes next
                waits.append(req)
            elif self._tree.load_back(req.best_match_node, req=req):
                self._loads[req] = req.best_match_node
                self.loaded_ahead_tokens += tokens
                room_tokens -= tokens
                started.append(req)
        if started:
            self._loading = [self._loads[req] for req in started]
            self._last_load = self._tree.ready_to_load_host_cache()
        return waits + started

    def fence(self, batch: ScheduleBatch) -> None:
        """Make a new prefill batch wait, layer by layer, for a load that still runs.

        It may have found a prefix that is being loaded. A load of its own is behind it in the same
        stream, so that waiting for that one is enough.
        """
        if batch.hicache_consumer_index < 0 and self._is_loading():
            batch.hicache_consumer_index = self._last_load

    def _is_loading(self) -> bool:
        # As SGLang's ranks agree: they see the end of a copy in the same step.
        return any(node in self._tree.ongoing_load_back for node in self._loading)

    def _tokens_to_load(self, req: Req, room_tokens: int) -> int:
        """What the host has of `req` and the device has not; 0 if there is no room for it."""
        if self._on_host.get(req, 0) > room_tokens:
            return 0  # it would not be worth another look
        req.init_next_round_input(self._tree)
        self._on_host[req] = req.host_hit_length
        return req.host_hit_length if req.host_hit_length <= room_tokens else 0
