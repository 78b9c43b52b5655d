"""Admission of one prefill pass: SGLang's PrefillAdder, with a purse of its own for offline work.

Online requests come first in the queue and are admitted as SGLang admits them. An offline request
may then use what is left of the step, at most the plan's tokens, and never leaves the KV pool
fuller than the plan's reserve.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

from conserve_sgl.engine.host import AddReqResult, PrefillAdder, Req

__all__ = ["OfflinePurse", "make_adder_class"]


class OfflinePurse:
    """What offline requests may still use in this pass.

    Args:
        tokens: prompt tokens to compute.
        kv_reserve_tokens: KV tokens that an admission must leave available.
        may_chunk: whether an offline prompt may be admitted in part. One at a time: SGLang tracks
            a single chunked request, and we put aside a single one.
        is_offline: tells an offline request.
    """

    def __init__(
        self,
        *,
        tokens: int,
        kv_reserve_tokens: int,
        may_chunk: bool,
        is_offline: Callable[[Req], bool],
    ) -> None:
        self.tokens = tokens
        self.kv_reserve_tokens = kv_reserve_tokens
        self.may_chunk = may_chunk
        self.is_offline = is_offline


def make_adder_class(purse: OfflinePurse) -> type[PrefillAdder]:
    """The adder class of one pass; SGLang constructs it with arguments of its own."""

    class ConserveAdder(PrefillAdder):
        def add_chunked_req(self, req: Req) -> Req | None:
            if not purse.is_offline(req):
                return super().add_chunked_req(req)
            with self._purse_as_chunk_limit():
                return super().add_chunked_req(req)

        def add_one_req(
            self, req: Req, has_chunked_req: bool, truncation_align_size: int | None
        ) -> AddReqResult:
            if not purse.is_offline(req):
                return super().add_one_req(req, has_chunked_req, truncation_align_size)
            if not self._offline_fits(req):
                return AddReqResult.OTHER
            with self._purse_as_chunk_limit():
                verdict = super().add_one_req(req, has_chunked_req, truncation_align_size)
            # NO_TOKEN would shut admission to online requests too (`batch_is_full`).
            return AddReqResult.OTHER if verdict is AddReqResult.NO_TOKEN else verdict

        def _offline_fits(self, req: Req) -> bool:
            if purse.tokens <= 0:
                return False
            new_tokens = len(req.full_untruncated_fill_ids) - req.prefix_len - req.host_hit_length
            may_chunk = purse.may_chunk and self.new_chunked_req is None
            if not may_chunk and self.ceil_paged_tokens(new_tokens) > self._chunk_limit():
                return False
            output_tokens = self._swa_new_tokens(req)  # SGLang's estimate, for any model
            needed = new_tokens + req.host_hit_length + output_tokens + self.page_size
            return self.rem_total_tokens - needed >= purse.kv_reserve_tokens

        def _chunk_limit(self) -> int:
            return min(self.rem_chunk_tokens, purse.tokens)

        @contextmanager
        def _purse_as_chunk_limit(self):
            """Within, SGLang sees a step of the purse's size; what it used is then charged."""
            outer, self.rem_chunk_tokens = self.rem_chunk_tokens, self._chunk_limit()
            before = self.rem_chunk_tokens
            try:
                yield
            finally:
                used = before - self.rem_chunk_tokens
                purse.tokens -= used
                self.rem_chunk_tokens = outer - used

    return ConserveAdder
