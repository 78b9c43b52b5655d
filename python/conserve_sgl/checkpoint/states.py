"""Slots for the states of state-space layers, and where a request's state may be kept.

A request that holds a row holds a slot, which its steps change in place. With SGLang's strategy
`extra_buffer` it holds slots beside it, into which its state is copied as it passes certain
positions, and it locks in the radix tree the state that it began from. SGLang has rows for as many
requests as there are slots for, so a row that is free finds them, unless the tree's are locked.

A state is that of all tokens up to one position, and of no other. What may enter the tree is

    no_buffer       the state in the slot, at the end of all KV that the request has: SGLang does
                    not overlap steps then, so that none is changing it
    extra_buffer    the last one that was copied beside it, where that was. With overlap scheduling
                    the step in flight may be at the next such position
"""

from __future__ import annotations

import math
from functools import cached_property

from conserve_sgl.checkpoint.host import Req, UnifiedRadixCache, mamba_track_grid

__all__ = ["StateSlots"]


class StateSlots:
    """The slots of one engine. Of a model without such layers there is no end.

    Args:
        tree: SGLang's; its pool of rows has the slots.

    Attributes:
        per_row: slots that a request may need for its row, with the state that it locks.
    """

    def __init__(self, tree: UnifiedRadixCache) -> None:
        self._tree = tree
        self.per_row = self._copies = self._shares = 0
        if not tree.supports_mamba():
            return
        pool = tree.req_to_token_pool
        self._shares = tree.supports_prefix_sharing()
        self._copies = pool.mamba_initial_tracking_slots
        self.per_row = 1 + self._copies + self._shares

    @property
    def free(self) -> float:
        """Slots that nobody holds, or that the tree would give up at once."""
        if not self.per_row:
            return math.inf
        pool = self._tree.req_to_token_pool
        # States that are kept in int8 have slots of their own.
        evictable = self._tree.mamba_evictable_size() if pool.mamba_ckpt_pool is None else 0
        return pool.mamba_allocator.available_size() + evictable

    @property
    def free_rows(self) -> float:
        """Rows that would find the slots that they need."""
        # One is needed in between: to lock a new state before the one that it was is let go.
        return (self.free - self._shares) // self.per_row if self.per_row else math.inf

    def kept_len(self, req: Req, up_to: int) -> int:
        """Of the first `up_to` tokens of `req`, which holds a row, those at whose end there is a
        state that may be kept; 0 if there is none, or no slot to go on with.

        Args:
            up_to: tokens whose KV is written, or will be by the step in flight.
        """
        if not self.per_row:
            return up_to
        if self._copies:
            at = self._copied_at(req)
            kept = at if at <= up_to else 0
        else:
            kept = up_to if up_to == req.kv.kv_committed_len else 0
        return kept if kept and self.free_rows >= 1 else 0

    def _copied_at(self, req: Req) -> int:
        """Where the last copy of the state of `req` was made; 0 if a step since may have made
        another, to where it is not known yet."""
        at = req.kv.mamba_last_track_seqlen
        if at is None:
            return 0
        return at if req.kv.kv_committed_len // self._grid == at // self._grid else 0

    @cached_property
    def _grid(self) -> int:
        """Tokens between two positions at which rows that decode have their states copied."""
        return mamba_track_grid(self._tree.page_size)

    def settle(self, req: Req) -> None:
        """Have the next copy of the state of `req`, whose step has ended, spare the last one.

        SGLang takes turns with two slots, and foresees the turn of a step in flight: it takes it
        twice if a row does not decode in the step after (it sits out, or a prompt goes first), and
        not at all for the first token of a prompt. The next copy would then fall on the last one,
        which until its step has ended is still taken for what it was.
        """
        kv = req.kv
        if self._copies != 2 or kv.mamba_ping_pong_track_buffer is None:
            return
        if kv.mamba_next_track_idx != kv.mamba_last_track_idx:
            return
        computed = req.seqlen - 1
        foreseen = kv.kv_committed_len > computed and kv.kv_committed_len % self._grid == 0
        if not foreseen:
            kv.mamba_next_track_idx = 1 - kv.mamba_last_track_idx

    def take_back(self, req: Req) -> None:
        """Take the slot of `req`, which got one as it was looked up and was not admitted then."""
        kv = req.kv
        if not self.per_row or kv.holds_kv or not kv.holds_mamba:
            return
        self._tree.req_to_token_pool.mamba_allocator.free(kv.mamba_pool_idx.unsqueeze(-1))
        kv.mamba_pool_idx = kv.mamba_cow_src_index = None
        kv.mamba_needs_clear = False
