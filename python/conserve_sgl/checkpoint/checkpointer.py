"""Checkpoints of running offline requests in SGLang's radix tree, and what became of them.

Who owns the KV of a request that holds a row, in tokens of that request:

    [0, cache_protected_len)                the tree; the request locks it, so it stays. A resume
                                            finds it as a prefix. With HiCache the tree writes it
                                            to the host, and pins it until the copy is done
    [cache_protected_len, kv_committed_len) the row; gone when the row is released
    [kv_committed_len, kv_allocated_len)    the row; nothing is there yet, or drafts, of which
                                            those that are accepted are committed

A checkpoint moves the first boundary up, to the last page that is certainly written: with overlap
scheduling a step is in flight that writes the token at `seqlen - 1`. Prompts need none: SGLang
inserts every prefill chunk when it ends.

What becomes of a request, and what is kept of it here:

    running, parked   row + KV    a checkpoint every stride
    released          no row      `_suspended`: how much it had computed; its KV is evictable from
                                  the device, and kept on the host (`host_copies.py`)
    resumed           row + KV    prefix found: restored; the rest up to what it had: recomputed

A checkpoint that fails, is evicted, or cannot be loaded back costs recomputation and nothing
else: the tokens of the request ride on `Req`, and SGLang prefills whatever prefix is not found.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from conserve_sgl.checkpoint.host import (
    HiCacheController,
    Req,
    ScheduleBatch,
    UnifiedRadixCache,
    release_req,
)
from conserve_sgl.checkpoint.host_copies import HostCopies
from conserve_sgl.checkpoint.host_writes import HostWrites
from conserve_sgl.checkpoint.kv_pools import KvPools
from conserve_sgl.checkpoint.ownership import check_ownership, is_asked_for
from conserve_sgl.checkpoint.penalties import restore_penalties
from conserve_sgl.checkpoint.states import StateSlots
from conserve_sgl.config import CheckpointConfig
from conserve_sgl.policy.checkpoint_cost import (
    CheckpointPlan,
    CheckpointView,
    Risk,
    copies_pay,
    plan_checkpoints,
)
from conserve_sgl.policy.victims import Candidate, choose_victims

__all__ = ["Checkpointer"]

_COUNTS = (
    "checkpoints",
    "checkpointed_tokens",
    "checkpointed_bytes",
    "checkpoint_ns",
    "restored_tokens",
    "recomputed_tokens",
    "host_full",
)


def _host_cache(tree: UnifiedRadixCache) -> HiCacheController | None:
    """HiCache's controller, when it copies to the host whatever enters the tree.

    Without HiCache, and with its other policies, a checkpoint lives on the device alone until
    SGLang evicts it.
    """
    writes_through = (
        tree.cache_controller is not None
        and tree.buffer_pipeline is None
        and not tree.is_write_back
        and tree.write_through_threshold == 1
    )
    return tree.cache_controller if writes_through else None


class Checkpointer:
    """Checkpoints offline requests, releases them, and counts what a resume found.

    Args:
        tree_cache: the scheduler's.
        config: of the operator.
        enabled: whether checkpoints are made.
        copies: whether they are copied to the host; the tree then has one that writes through.
        max_total_tokens: KV tokens of the device pool.
        token_bytes: KV of a token, in all layers.
        is_offline: tells an offline request; no other is touched.

    Attributes:
        states: of state-space layers; a checkpoint ends where there is one.
        token_s: seconds that computing a token of a request again takes; the same on all ranks.
    """

    def __init__(
        self,
        tree_cache: UnifiedRadixCache,
        config: CheckpointConfig,
        *,
        enabled: bool,
        copies: bool,
        max_total_tokens: int,
        token_bytes: int,
        is_offline: Callable[[Req], bool],
    ) -> None:
        self._tree = tree_cache
        self._is_offline = is_offline
        self._allocator = tree_cache.token_to_kv_pool_allocator
        self._pools = KvPools(tree_cache)
        self.states = StateSlots(tree_cache)
        self._page = tree_cache.page_size
        self._stride_tokens = config.stride_tokens
        self._total_tokens = max_total_tokens
        self.enabled = enabled
        self._host = _host_cache(tree_cache)
        copied_to = self._host if copies else None
        self._copies = HostCopies(tree_cache, copied_to)
        self._writes = HostWrites(
            tree_cache, copied_to, is_offline=is_offline, pays=self.copies_pay
        )
        self._check = is_asked_for() and tree_cache.supports_prefix_sharing()
        self._suspended: WeakKeyDictionary[Req, int] = WeakKeyDictionary()
        self._in_host: WeakKeyDictionary[Req, int] = WeakKeyDictionary()
        self._shared: WeakKeyDictionary[Req, int] = WeakKeyDictionary()
        self._counts = Counter(dict.fromkeys(_COUNTS, 0))
        self._risk = Risk()
        self.token_s = 0.0
        self._token_bytes = token_bytes

    # ------------------------------------------------------- while requests run

    def after_result(self, batch: ScheduleBatch, *, online_tight: bool) -> None:
        """Checkpoint the offline rows of `batch`, whose results are in, that are due."""
        if self._check:
            check_ownership(filter(self._is_offline, batch.reqs), self._tree)
        decoded = batch.reqs if batch.forward_mode.is_decode() else batch.decoding_reqs or ()
        if self.states.per_row:
            for req in decoded:
                self.states.settle(req)
        # The prompts of a prefill batch may be between two chunks; SGLang inserts those.
        offline = list(filter(self._is_offline, decoded))
        if not (self.enabled and offline):
            return
        self._risk.grew(len(offline))
        if self._host is not None and not self.copies_pay():
            return  # a request that gives way enters the tree as it does
        plan = self._plan(online_tight)
        budget = plan.budget_tokens
        for req in offline:
            if budget <= 0:
                return
            due = req.seqlen - 1 - req.kv.cache_protected_len >= plan.stride_tokens
            if due and self._may_checkpoint(req):
                budget -= self._checkpoint(req, req.seqlen - 1)

    def _plan(self, online_tight: bool) -> CheckpointPlan:
        return plan_checkpoints(
            CheckpointView(
                stride_tokens=self._stride_tokens,
                token_s=self.token_s,
                risk=self._risk.per_token,
                page_tokens=self._page,
                free_kv_tokens=self._pools.free_tokens,
                total_kv_tokens=self._total_tokens,
                backlog_tokens=self.backlog_tokens(),
                online_tight=online_tight,
            )
        )

    def backlog_tokens(self) -> int:
        """Tokens that wait for the copy to the host, or are being copied."""
        if self._host is None:
            return 0
        queued = sum(len(op.device_indices) for op in self._host.write_queue)
        return queued + sum(ack.num_tokens for ack in self._host.ack_write_queue)

    def copies_pay(self) -> bool:
        """Whether all KV of offline requests is copied to the host as it comes."""
        return copies_pay(
            token_s=self.token_s,
            risk=self._risk.per_token,
            token_bytes=self._token_bytes,
        )

    def _may_checkpoint(self, req: Req) -> bool:
        return (
            self.enabled
            and req.kv.holds_kv  # not released since, as a step in flight may still report
            and not req.finished()
            and not req.skip_radix_cache_insert
            and req.beam_group is None
        )

    def _checkpoint(self, req: Req, up_to: int) -> int:
        """Give the tree what `req` has up to there, in whole pages; the tokens that are new."""
        before, up_to = req.kv.cache_protected_len, self.states.kept_len(req, up_to)
        if up_to // self._page * self._page <= before:
            return 0
        start_ns = time.perf_counter_ns()
        req.refresh_fill_ids()
        self._tree.checkpoint(req, up_to=up_to)
        self._counts["checkpoint_ns"] += time.perf_counter_ns() - start_ns
        new_tokens = req.kv.cache_protected_len - before
        self._counts["checkpoints"] += 1
        self._counts["checkpointed_tokens"] += new_tokens
        self._counts["checkpointed_bytes"] += new_tokens * self._token_bytes
        self._note_host_copy(req)
        return new_tokens

    def _note_host_copy(self, req: Req) -> None:
        if self._host is None:
            return
        if self._tree.is_backuped(req.last_node):
            self._in_host[req] = req.kv.cache_protected_len
        else:
            self._counts["host_full"] += 1

    # ----------------------------------------------------------- giving way

    def cheapest(self, running: list[Req], aside: list[Req]) -> Req | None:
        """The request that loses least by giving way, of those that hold KV; None if there is
        none."""
        reqs = running + aside
        candidates = [
            self._candidate(req, index, is_running=index < len(running))
            for index, req in enumerate(reqs)
            if req.kv.holds_kv and req.beam_group is None
        ]
        victims = choose_victims(candidates, needed_tokens=1)
        return reqs[victims[0].index] if victims else None

    def reclaimable_tokens(self, req: Req) -> int:
        """KV tokens that releasing `req` lets others have, but for what it found in the tree when
        it came first: requests that run beside it may have found the same."""
        total = req.kv.kv_allocated_len
        return total - min(self._shared.get(req, 0), total)

    def kept_tokens(self, req: Req) -> int:
        """Of `reclaimable_tokens`, those that outlive the row of `req` in the tree."""
        shared = min(self._shared.get(req, 0), req.kv.kv_committed_len)
        return max(req.kv.cache_protected_len - shared, 0) if self.enabled else 0

    def _candidate(self, req: Req, index: int, *, is_running: bool) -> Candidate:
        total = req.kv.kv_committed_len
        return Candidate(
            index=index,
            total_tokens=total,
            checkpointed_tokens=min(self._kept_tokens(req), total),
            is_running=is_running,
        )

    def _kept_tokens(self, req: Req) -> int:
        if not self.enabled:
            return 0
        # SGLang's own insertions count too: those of prompts, chunk by chunk.
        if self._host is None or self._tree.is_backuped(req.last_node):
            return req.kv.cache_protected_len
        return self._in_host.get(req, 0)

    def give_way(self, req: Req, *, urgent: bool) -> None:
        """Release a request that runs again later; nobody else holds its row.

        Args:
            urgent: its memory is needed in this step. What came after the last checkpoint is then
                copied to the host only if most of the request is there already: a page is pinned to
                the device while it is copied. The tree has it as long as nobody needs the room.
        """
        new_tokens = req.kv.kv_committed_len - req.kv.cache_protected_len
        copies = not urgent or self._in_host.get(req, 0) >= new_tokens
        self.gave_way(req)
        if self._may_checkpoint(req):
            with self._writes.decided(copies):
                self._checkpoint(req, min(req.owned_kv_len(), req.seqlen))
        self._copies.pin(req)
        self.release(req)

    def give_up(self, req: Req) -> None:
        """Release a request in the midst of a prefill; nobody else holds its row.

        Its KV beyond the prefix is written for some layers only and must not enter the tree.
        """
        self._suspended.setdefault(req, req.prefix_len)
        self._copies.pin(req)
        self.release(req)

    def gave_way(self, req: Req) -> None:
        """Remember what `req` had computed, to count what its resume finds of it.

        Also for requests that SGLang itself took out of the engine. Idempotent until the resume.
        """
        if req not in self._suspended:
            self._risk.gave_way()
            self._suspended[req] = req.kv.kv_committed_len or req.seqlen - 1

    def release(self, req: Req) -> None:
        """Release the row and KV of `req`, which nobody else holds."""
        release_req(
            req=req,
            remaing_req_count=0,
            req_to_token_pool=self._tree.req_to_token_pool,
            token_to_kv_pool_allocator=self._allocator,
            tree_cache=self._tree,
            hisparse_coordinator=None,
        )
        self._in_host.pop(req, None)

    # ----------------------------------------------------------- coming back

    def load_ahead(self, reqs: list[Req], room_tokens: int) -> list[Req]:
        """Those of `reqs` that wait for their KV: see `HostCopies.load_ahead`. Requests that have
        computed nothing yet are left to SGLang."""
        return self._copies.load_ahead([r for r in reqs if r in self._suspended], room_tokens)

    def forget(self, reqs: list[Req]) -> None:
        """These gave way, and will not come back: they were aborted in the queue."""
        for req in reqs:
            self._copies.forget(req)

    def cache_emptied(self) -> None:
        """The tree holds nothing any more, on the device or on the host."""
        self._copies.clear()

    def admitted(self, batch: ScheduleBatch, *, lagging: bool) -> None:
        """Take note of the requests of a new prefill batch that had given way.

        Counts what was found of them in the tree, and what has to be computed again; restores
        what SGLang forgets of their sampling state (see `restore_penalties` for `lagging`).
        """
        restore_penalties(batch, self._is_offline, lagging=lagging)
        self._copies.fence(batch)
        for req in filter(self._is_offline, batch.reqs):
            self._copies.forget(req)
            self._shared.setdefault(req, req.prefix_len)
            computed = self._suspended.pop(req, 0)
            restored = min(req.prefix_len, computed)
            self._counts["restored_tokens"] += restored
            self._counts["recomputed_tokens"] += computed - restored

    def host_tokens(self) -> tuple[int, int, int] | None:
        """Of HiCache's pool on the host: all, those in use, those pinned; None without HiCache."""
        if self._tree.cache_controller is None:
            return None
        pool = self._tree.cache_controller.mem_pool_host
        return pool.size, pool.size - pool.available_size(), self._copies.pinned_tokens

    def state(self) -> dict[str, Any]:
        """What `/server_info` shows under `internal_states[i].conserve.checkpoint`."""
        return {
            "enabled": self.enabled,
            "host_cache": self._host is not None,
            "backlog_tokens": self.backlog_tokens(),
            "pinned_tokens": self._copies.pinned_tokens,
            "loaded_ahead_tokens": self._copies.loaded_ahead_tokens,
            **self._counts,
        }
