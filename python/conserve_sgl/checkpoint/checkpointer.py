"""Checkpoints of running offline requests in SGLang's radix tree, and what became of them.

Who owns the KV of a request that holds a row, in tokens of that request:

    [0, cache_protected_len)                the tree; the request locks it, so it stays. A resume
                                            finds it as a prefix. With HiCache the tree writes it
                                            to the host, and pins it until the copy is done
    [cache_protected_len, kv_committed_len) the row; gone when the row is released
    [kv_committed_len, kv_allocated_len)    the row; nothing is there yet

A checkpoint moves the first boundary up, to the last page that is certainly written: with overlap
scheduling a step is in flight that writes the token at `seqlen - 1`. Prompts need none: SGLang
inserts every prefill chunk when it ends.

What becomes of a request, and what is kept of it here:

    running, parked   row + KV    a checkpoint every stride
    released          no row      `_suspended`: how much it had computed; its KV is evictable
    resumed           row + KV    prefix found: restored; the rest up to what it had: recomputed

A checkpoint that fails, is evicted, or cannot be loaded back costs recomputation and nothing
else: the tokens of the request ride on `Req`, and SGLang prefills whatever prefix is not found.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from conserve_sgl.checkpoint.host import Req, UnifiedRadixCache, get_serving, release_req
from conserve_sgl.config import CheckpointConfig
from conserve_sgl.policy.checkpointing import CheckpointPlan, CheckpointView, plan_checkpoints
from conserve_sgl.policy.victims import Candidate

__all__ = ["Checkpointer"]

logger = logging.getLogger(__name__)

_COUNTS = (
    "checkpoints",
    "checkpointed_tokens",
    "checkpointed_bytes",
    "restored_tokens",
    "recomputed_tokens",
    "host_full",
)


class Checkpointer:
    """Checkpoints offline requests, releases them, and counts what a resume found.

    Args:
        tree_cache: the scheduler's; a cache that shares no prefixes turns checkpoints off.
        config: of the operator.
        max_total_tokens: KV tokens of the device pool.
    """

    def __init__(
        self, tree_cache: UnifiedRadixCache, config: CheckpointConfig, *, max_total_tokens: int
    ) -> None:
        self._tree = tree_cache
        self._allocator = tree_cache.token_to_kv_pool_allocator
        self._page = tree_cache.page_size
        self._stride_tokens = config.stride_tokens
        self._total_tokens = max_total_tokens
        # SGLang frees what was thought between think tags from the row when a request ends; a tree
        # that had it already would be asked to free it twice.
        self.enabled = (
            config.enabled
            and tree_cache.supports_prefix_sharing()
            and not get_serving().strip_thinking_cache
        )
        self._host = tree_cache.cache_controller
        self._suspended: WeakKeyDictionary[Req, int] = WeakKeyDictionary()
        self._in_host: WeakKeyDictionary[Req, int] = WeakKeyDictionary()
        self._counts = Counter(dict.fromkeys(_COUNTS, 0))
        self._bytes_per_token = self._measure_bytes_per_token()

    def _measure_bytes_per_token(self) -> int:
        pool = self._allocator.get_kvcache()
        return int(sum(pool.get_kv_size_bytes())) // (
            pool.size + pool.page_size
        )  # one page is padding

    # ------------------------------------------------------- while requests run

    def after_result(self, offline: Iterable[Req], *, online_tight: bool) -> None:
        """Checkpoint those of `offline`, whose step has just been processed, that are due."""
        if not self.enabled:
            return
        plan = self._plan(online_tight)
        budget = plan.budget_tokens
        for req in offline:
            if budget <= 0:
                return
            if self._is_due(req, plan):
                budget -= self._checkpoint(req, req.seqlen - 1)

    def _plan(self, online_tight: bool) -> CheckpointPlan:
        return plan_checkpoints(
            CheckpointView(
                stride_tokens=self._stride_tokens,
                page_tokens=self._page,
                free_kv_tokens=self._allocator.available_size() + self._tree.evictable_size(),
                total_kv_tokens=self._total_tokens,
                backlog_tokens=self._backlog_tokens(),
                online_tight=online_tight,
            )
        )

    def _backlog_tokens(self) -> int:
        """Tokens that wait for the copy to the host, or are being copied."""
        if self._host is None:
            return 0
        queued = sum(len(op.device_indices) for op in self._host.write_queue)
        return queued + sum(ack.num_tokens for ack in self._host.ack_write_queue)

    def _is_due(self, req: Req, plan: CheckpointPlan) -> bool:
        new_tokens = req.seqlen - 1 - req.kv.cache_protected_len
        return new_tokens >= plan.stride_tokens and self._may_checkpoint(req)

    def _may_checkpoint(self, req: Req) -> bool:
        return (
            self.enabled
            and req.kv.holds_kv
            and not req.finished()
            and not req.skip_radix_cache_insert
            and req.beam_group is None
        )

    def _checkpoint(self, req: Req, up_to: int) -> int:
        """Give the tree what `req` has up to there, in whole pages; the tokens that are new."""
        before = req.kv.cache_protected_len
        if up_to // self._page * self._page <= before:
            return 0
        req.refresh_fill_ids()
        self._tree.checkpoint(req, up_to=up_to)
        new_tokens = req.kv.cache_protected_len - before
        self._counts["checkpoints"] += 1
        self._counts["checkpointed_tokens"] += new_tokens
        self._counts["checkpointed_bytes"] += new_tokens * self._bytes_per_token
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

    def candidate(self, req: Req, index: int, *, is_running: bool) -> Candidate:
        """What releasing `req` would free and lose, for `choose_victims`."""
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
        return req.kv.cache_protected_len if self._host is None else self._in_host.get(req, 0)

    def release(self, req: Req, *, keep: bool) -> None:
        """Release the row and KV of `req`, which nobody else holds.

        Args:
            keep: whether it runs again, so that the tree should have what it computed.
        """
        if keep:
            self._suspended[req] = req.kv.kv_committed_len
            if self._may_checkpoint(req):
                self._checkpoint(req, min(req.owned_kv_len(), req.seqlen))
        release_req(
            req=req,
            remaing_req_count=0,
            req_to_token_pool=self._tree.req_to_token_pool,
            token_to_kv_pool_allocator=self._allocator,
            tree_cache=self._tree,
            hisparse_coordinator=None,
        )

    # ----------------------------------------------------------- coming back

    def admitted(self, reqs: Iterable[Req]) -> None:
        """Count, for those of `reqs` that had given way, what was found and what was not."""
        for req in reqs:
            computed = self._suspended.pop(req, 0)
            restored = min(req.prefix_len, computed)
            self._counts["restored_tokens"] += restored
            self._counts["recomputed_tokens"] += computed - restored

    def state(self) -> dict[str, Any]:
        """What `/server_info` shows under `internal_states[i].conserve.checkpoint`."""
        return {"enabled": self.enabled, "backlog_tokens": self._backlog_tokens(), **self._counts}
