"""KV memory: what is free, and offline requests that give theirs to whoever needs it more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conserve_sgl.checkpoint.checkpointer import Checkpointer
from conserve_sgl.checkpoint.fault import RandomPreemption
from conserve_sgl.checkpoint.kv_pools import KvPools
from conserve_sgl.engine.aside import Aside
from conserve_sgl.engine.host import Req, ScheduleBatch
from conserve_sgl.status.record import HostKv, Kv

__all__ = ["KvMemory"]


class KvMemory:
    """The KV of one scheduler, and who gives way in it.

    Where layers have windows there are two pools (`KvPools`). What is told of KV here is that of
    the layers without one, which a token holds as long as its request; what a window needs is
    little, and is asked for beside it. State-space layers have slots for rows (`StateSlots`): a row
    is free where those are, too.

    Args:
        tree_cache: SGLang's; its allocator is that of the KV.
        total_tokens: of KV.
        checkpoints: releases requests, and knows what each loses.
        aside: requests that SGLang does not know of.
        is_offline: tells an offline request; no other gives way.
        requeue: takes a request that gave way, without row and KV.
        free_rows: tells how many rows of requests nobody holds, be there states for them or not.
    """

    def __init__(
        self,
        tree_cache: Any,
        *,
        total_tokens: int,
        checkpoints: Checkpointer,
        aside: Aside,
        is_offline: Callable[[Req], bool],
        requeue: Callable[[Req], None],
        free_rows: Callable[[], int],
    ) -> None:
        self._pools = KvPools(tree_cache)
        self._page = tree_cache.page_size
        self._total_tokens = total_tokens
        self._checkpoints = checkpoints
        self._aside = aside
        self._is_offline = is_offline
        self._requeue = requeue
        self._states = checkpoints.states
        self._free_rows = free_rows
        self._chance = RandomPreemption.from_environment()

    # -------------------------------------------------------------- what is there

    @property
    def free_tokens(self) -> int:
        """KV tokens that nobody holds, or that the radix tree would give up at once."""
        return self._pools.free_tokens

    @property
    def free_rows(self) -> int:
        """Rows of requests that nobody holds, with what their states need."""
        return int(min(self._free_rows(), self._states.free_rows))

    def admissible(self, online: int, offline: int) -> int:
        """How many of so many offline requests find states behind so many online ones."""
        return int(max(min(offline, self._states.free_rows - online), 0))

    def offers(self, running: ScheduleBatch) -> int:
        """KV tokens that offline requests, of `running` or aside, would give to an online one."""
        offline = filter(self._is_offline, running.reqs)
        return sum(map(self._checkpoints.reclaimable_tokens, [*offline, *self._aside.reqs]))

    def holds_offline(self, running: ScheduleBatch) -> bool:
        """Whether an offline request, of `running` or aside, holds any."""
        return bool(self._aside.reqs) or any(map(self._is_offline, running.reqs))

    def is_left_to(self, running: ScheduleBatch) -> bool:
        """Whether nobody but one offline request holds KV: SGLang decides if it does not fit.

        Others are an online prompt between two chunks, requests that a step in flight ends, and
        KV that is pinned while it is copied: all of them let go of it in time.
        """
        reqs = running.reqs
        if len(reqs) != 1 or not self._is_offline(reqs[0]) or self._aside.reqs:
            return False
        own_pages = -(-reqs[0].kv.kv_allocated_len // self._page)
        return self.free_tokens >= self._total_tokens - own_pages * self._page

    def pools(self, reqs: list[Req], reserved_tokens: int) -> Kv:
        """Who holds the pool now.

        Args:
            reqs: offline requests that were taken from the queue.
            reserved_tokens: what offline work leaves to online work.
        """
        held = [req for req in reqs if req.kv.holds_kv]
        free, cached = self._pools.unheld_tokens, self._pools.cached_tokens
        in_use = max(self._total_tokens - free - cached, 0)
        host = self._checkpoints.host_tokens()
        offline = min(sum(map(self._checkpoints.reclaimable_tokens, held)), in_use)
        return Kv(
            total=self._total_tokens,
            online=in_use - offline,
            offline=offline,
            checkpointed=min(sum(map(self._checkpoints.kept_tokens, held)), offline),
            cached=cached,
            free=free,
            reserved=reserved_tokens,
            host=None if host is None else HostKv(total=host[0], used=host[1], pinned=host[2]),
        )

    # ------------------------------------------------------------------ giving way

    def give_way(self, running: ScheduleBatch, enough: Callable[[], bool]) -> bool:
        """Preempt offline requests, those that lose least first, until there is enough KV.

        Returns:
            Whether there is; if not, no offline request is left in `running` or aside.
        """
        while not enough():
            offline = list(filter(self._is_offline, running.reqs))
            victim = self._checkpoints.cheapest(offline, self._aside.reqs)
            if victim is None:
                return False
            if victim in self._aside.slices.suspended_reqs:
                self.preempt_suspended()
            elif victim in offline:
                self.preempt_rows(running, [victim], urgent=True)
            else:
                self.preempt_aside(lambda req, victim=victim: req is victim, urgent=True)
        return True

    def make_room(self, running: ScheduleBatch, tokens: int, window_tokens: int) -> bool:
        """`give_way` until so many KV tokens are free, and so many in layers with a window.

        Returns:
            Whether so many tokens are. Where a window is short, SGLang waits or takes less at once.
        """
        pools = self._pools
        self.give_way(
            running,
            lambda: pools.free_tokens >= tokens and pools.free_window_tokens >= window_tokens,
        )
        return pools.free_tokens >= tokens

    def make_rows(self, running: ScheduleBatch, wanted: int) -> bool:
        """`give_way` until a row is free for a request of the `wanted`, and until there are states
        for as many of them as there are rows for."""
        states = self._states

        def enough() -> bool:
            rows = min(self._free_rows(), wanted)
            return rows > 0 and states.free_rows >= rows

        return self.give_way(running, enough)

    def preempt_rows(
        self, running: ScheduleBatch, reqs: list[Req], *, urgent: bool = False
    ) -> None:
        """Preempt rows of `running`, which loses them."""
        running.filter_batch(reqs_to_exclude=reqs)
        self._preempt(reqs, urgent=urgent)

    def preempt_aside(self, matches: Callable[[Req], bool], *, urgent: bool = False) -> None:
        """Preempt those that match of what is aside, but for a suspended prefill."""
        self._preempt(self._aside.take(matches), urgent=urgent)

    def preempt_all(self, running: ScheduleBatch) -> None:
        """Preempt all that is offline, in `running` or aside, but for beam searches, which SGLang
        cannot take up again. Looks only, where there is none."""
        if not self.holds_offline(running):
            return
        self.preempt_all_aside()
        rows = [req for req in running.reqs if self._is_offline(req) and req.beam_group is None]
        if rows:
            self.preempt_rows(running, rows)
        running.batch_is_full = False  # rows came free, be it those of requests aside

    def preempt_all_aside(self) -> None:
        """Preempt all that is aside."""
        self.preempt_aside(lambda _req: True)
        self.preempt_suspended()

    def preempt_suspended(self) -> None:
        """Preempt a suspended prefill: all of its requests, since it is computed as one."""
        for req in self._aside.slices.give_up():
            self._checkpoints.give_up(req)
            self._requeue(req)

    def preempt_at_random(self, running: ScheduleBatch) -> None:
        """For tests: see `RandomPreemption`."""
        if self._chance is None:
            return
        rows = self._chance.victims(filter(self._is_offline, running.reqs))
        aside = {id(req) for req in self._chance.victims(self._aside.whole)}
        self.preempt_rows(running, rows)
        self.preempt_aside(lambda req: id(req) in aside)

    def _preempt(self, reqs: list[Req], *, urgent: bool) -> None:
        for req in reqs:
            self._checkpoints.give_way(req, urgent=urgent)
            self._requeue(req)
