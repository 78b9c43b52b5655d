"""Admission of one prefill pass: SGLang's PrefillAdder, with a purse of its own for offline work.

Online requests come first in the queue and are admitted as SGLang admits them, except that KV which
offline requests hold counts as free (they give way when it is needed). An offline request may then
use what is left of the step, at most the plan's tokens, and never leaves the KV pool fuller than
the plan's reserve.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from conserve_sgl.engine.host import AddReqResult, PrefillAdder, Req, SWAPrefillBudget
from conserve_sgl.engine.memory import KvMemory

__all__ = ["ConserveAdder", "OfflinePurse"]


class OfflinePurse:
    """What offline requests may still use in this pass.

    Args:
        tokens: prompt tokens that offline requests may compute.
        kv_reserve_tokens: KV tokens that an offline admission must leave available.
        memory: where online requests get KV from offline ones.
        online_waits: whether an online prompt is there to be admitted.
        may_chunk: whether an offline prompt may be admitted in part. One at a time: SGLang tracks
            a single chunked request, and we put aside a single one.
        is_offline: tells an offline request.

    Attributes:
        found_no_kv: whether the pool, without its reserve, held no room for one of them.
    """

    def __init__(
        self,
        *,
        tokens: int,
        kv_reserve_tokens: int,
        memory: KvMemory,
        online_waits: bool,
        may_chunk: bool,
        is_offline: Callable[[Req], bool],
    ) -> None:
        self.tokens = tokens
        self.kv_reserve_tokens = kv_reserve_tokens
        self.memory = memory
        self.online_waits = online_waits
        self.may_chunk = may_chunk
        self.is_offline = is_offline
        self.found_no_kv = False


class ConserveAdder(PrefillAdder):
    """The adder of one pass.

    Args:
        purse: what offline requests may use; charged with what they do.
        args, kwargs: those that SGLang constructs its own adder with.
    """

    def __init__(self, purse: OfflinePurse, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._purse = purse
        self._offline_needs = sum(
            self._get_running_request_total_token_offset(req)
            for req in self.running_batch.reqs
            if self._purse.is_offline(req)
        )
        self._offline_claim = 0
        self._claim(self._offline_needs + self._reclaimable)

    def _claim(self, tokens: int) -> None:
        """To online admissions, what offline requests hold or may still need is free."""
        self.memory_budget.total_offset += self._offline_claim - tokens
        self._offline_claim = tokens

    def add_chunked_req(self, req: Req) -> Req | None:
        if not self._purse.is_offline(req):
            self._make_room(req, len(req.full_untruncated_fill_ids) - req.prefix_len)
            return super().add_chunked_req(req)
        with self._purse_as_limit():
            return super().add_chunked_req(req)

    def add_one_req(
        self, req: Req, has_chunked_req: bool, truncation_align_size: int | None
    ) -> AddReqResult:
        new_tokens = len(req.full_untruncated_fill_ids) - req.prefix_len - req.host_hit_length
        if not self._purse.is_offline(req):
            # The cached prefix counts too: admission locks it, and it is free no longer.
            cached_tokens = req.prefix_len + req.host_hit_length
            self._make_room(req, new_tokens, cached_tokens)
            verdict = super().add_one_req(req, has_chunked_req, truncation_align_size)
            if verdict is AddReqResult.NO_TOKEN and self._now_fits(req, cached_tokens):
                self.req_states = None
                verdict = super().add_one_req(req, has_chunked_req, truncation_align_size)
            return verdict
        if not self._offline_fits(new_tokens):
            return AddReqResult.OTHER
        with self._purse_as_limit():
            verdict = super().add_one_req(req, has_chunked_req, truncation_align_size)
        if verdict is not AddReqResult.NO_TOKEN:
            return verdict
        self._purse.found_no_kv = True
        return AddReqResult.OTHER  # NO_TOKEN would shut admission to online requests too

    def _make_room(self, req: Req, new_tokens: int, cached_tokens: int = 0) -> None:
        """Get the KV of the next chunk from offline requests, as far as it is not free."""
        if self._offline_claim:
            chunk = min(new_tokens, self.rem_chunk_tokens)
            tokens = cached_tokens + self.ceil_paged_tokens(chunk + 1)
            self._get(tokens, self._window_tokens(req, new_tokens, cached_tokens))

    def _window_tokens(self, req: Req, new_tokens: int, cached_tokens: int) -> int:
        """What `req` needs in layers with a window, by SGLang's own account, which wants a token
        more; 0 where there are none."""
        budget = self.memory_budget
        if not isinstance(budget, SWAPrefillBudget):
            return 0
        locked = min(cached_tokens, self.tree_cache.sliding_window_size)
        needed = budget.swa_tokens(
            self.ceil_paged_tokens(new_tokens),
            self._swa_new_tokens(req),
            chunk_limit=self.rem_chunk_tokens,
        )
        return int(budget.swa_offset) + self.ceil_paged_tokens(locked) + needed + 1

    def _now_fits(self, req: Req, cached_tokens: int) -> bool:
        """Whether offline requests gave way for all that `req` may ever need.

        Without a prefix cache SGLang admits a request with `ignore_eos` by another account,
        to which what offline requests hold is not free until it is.
        """
        rest = req.sampling_params.max_new_tokens - len(req.output_ids)
        new_tokens = len(req.full_untruncated_fill_ids) - cached_tokens
        needed = cached_tokens + self.ceil_paged_tokens(new_tokens + max(rest, 0) + 1)
        missing = needed + self._admitted - self._purse.memory.free_tokens
        window_tokens = self._window_tokens(req, new_tokens, cached_tokens)
        return 0 < missing <= self._reclaimable and self._get(needed, window_tokens)

    def _get(self, tokens: int, window_tokens: int) -> bool:
        enough = self._purse.memory.make_room(
            self.running_batch, self._admitted + tokens, window_tokens
        )
        # What gave way is free now. If that is not enough, SGLang's own account decides.
        self._claim(self._offline_needs + self._reclaimable if enough else 0)
        return enough

    @property
    def _admitted(self) -> int:
        return int(self.memory_budget.current_offset)

    @property
    def _reclaimable(self) -> int:
        return self._purse.memory.offers(self.running_batch) if self._purse.online_waits else 0

    def _offline_fits(self, new_tokens: int) -> bool:
        if self._purse.tokens <= 0:
            return False
        may_chunk = self._purse.may_chunk and self.new_chunked_req is None
        return may_chunk or self.ceil_paged_tokens(new_tokens) <= self._chunk_limit()

    def _chunk_limit(self) -> int:
        return min(self.rem_chunk_tokens, self._purse.tokens)

    @contextmanager
    def _purse_as_limit(self):
        """Within, SGLang sees a step of the purse's size, and a pool without the KV that is
        offline's already or reserved to online. What it used is then charged."""
        outer, self.rem_chunk_tokens = self.rem_chunk_tokens, self._chunk_limit()
        before = self.rem_chunk_tokens
        withheld = self._offline_claim + self._purse.kv_reserve_tokens
        self.memory_budget.total_offset += withheld
        try:
            yield
        finally:
            self.memory_budget.total_offset -= withheld
            used = before - self.rem_chunk_tokens
            self._purse.tokens -= used
            self.rem_chunk_tokens = outer - used
