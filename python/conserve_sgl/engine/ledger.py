"""Keeps account of offline work: what it was served, how fast, and how it ended."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from conserve_sgl.engine.offline_item import answer_tokens, served_tokens
from conserve_sgl.policy import Backlog, OfflineQueue

if TYPE_CHECKING:  # the tests of this file need no SGLang
    from conserve_sgl.engine.host import Req, ScheduleBatch

__all__ = ["OfflineLedger", "is_aborted"]

_CLOSE_STEPS = 32
_WINDOW_S = 60.0
_TOKEN_KINDS = ("computed", "cached", "output")
_COUNTS = (
    "offline_accepted",
    "offline_refused",
    "offline_finished",
    "offline_aborted",
    "offline_deadline_missed",
    "offline_preempted",
    "offline_rows_parked",
    "offline_chunks_parked",
)


def is_aborted(req: Req) -> bool:
    """Whether a request that is finished was aborted: its client left, or asked for it."""
    return req.finished_reason.to_json()["type"] == "abort"


class OfflineLedger:
    """The accounts of the requests in `queue`, and those that were taken from it.

    Args:
        queue: is told what the requests that are done have cost.
        is_offline: tells an offline request.

    Attributes:
        counts: events since the start; any part of the scheduler may add to them.
        tokens: offline tokens since the start by kind: prompt tokens `computed` (again after a
            preemption) and `cached` (at a request's first admission), and `output` tokens.
    """

    def __init__(self, queue: OfflineQueue[Req], is_offline: Callable[[Req], bool]) -> None:
        self._queue = queue
        self._is_offline = is_offline
        self.counts: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
        self.tokens: Counter[str] = Counter(dict.fromkeys(_TOKEN_KINDS, 0))
        self._outputs: dict[str, int] = {}  # counted so far, by id of requests that have run
        self._steps = 0
        self._now_s = 0.0
        self._busy_s = 0.0
        self._samples: deque[tuple[float, int]] = deque()  # busy seconds, tokens served until then
        # Tokens that requests took and were expected to take, the older the less they count.
        self._took_tokens = self._expected_tokens = 0.0

    def step(self, now_s: float, batch: ScheduleBatch | None) -> None:
        """Once for each planned step, with the batch that SGLang formed, or None."""
        if batch is not None and batch.forward_mode.is_extend():
            self._count_prefill(batch)
        # Counted in steps, not in seconds: every rank must keep the same order. With nothing to
        # run the next step may be long in coming (--sleep-on-idle).
        self._steps += 1
        if batch is None or self._steps % _CLOSE_STEPS == 0:
            self.close_finished(now_s)

    def close_finished(self, now_s: float) -> None:
        """Settle the requests that are done, and note how far the others are."""
        for req in self._queue.taken:
            self._count_output(req)
            if req.finished():
                self.close(now_s, req)
        self._sample(now_s)

    def close(self, now_s: float, req: Req) -> None:
        """Settle a request that was taken from the queue and will not be given back to it."""
        self._count_output(req)
        self._outputs.pop(req.rid, None)
        item = self._queue.settle(req, served_tokens(req))
        if item is None:
            return
        if not req.finished() or is_aborted(req):
            self.counts["offline_aborted"] += 1
            return
        self.counts["offline_finished"] += 1
        if item.deadline_s is not None and now_s > item.deadline_s:
            self.counts["offline_deadline_missed"] += 1
        took_tokens = len(req.origin_input_ids) + answer_tokens(req)
        self._took_tokens += took_tokens - self._took_tokens / 64
        self._expected_tokens += item.tokens - self._expected_tokens / 64

    def removed(self, reqs: list[Req]) -> None:
        """These were removed from the queue, to be aborted."""
        self.counts["offline_aborted"] += len(reqs)
        for req in reqs:
            self._outputs.pop(req.rid, None)

    def backlog(self, now_s: float) -> Backlog:
        """What waits in the queue, and how much of it will be late at the present rate."""
        return self._queue.backlog(now_s, self.expected_tokens_per_s)

    def state(self, now_s: float, parked: int) -> dict[str, Any]:
        """Everything above as `/server_info` shows it; `parked` requests hold still."""
        backlog = self.backlog(now_s)
        return {
            "offline_waiting": backlog.requests,
            "offline_waiting_tokens": backlog.tokens,
            "offline_waiting_jobs": backlog.jobs,
            "offline_oldest_wait_s": backlog.oldest_wait_s,
            "offline_at_risk": backlog.at_risk,
            "offline_running": max(len(self._queue.taken) - parked, 0),
            "offline_parked": parked,
            "offline_tokens": dict(self.tokens),
            **self.counts,
        }

    # ------------------------------------------------------------------ counting

    def _count_prefill(self, batch: ScheduleBatch) -> None:
        decoding = {id(req) for req in batch.decoding_reqs or ()}
        for req in batch.reqs:
            if not self._is_offline(req) or id(req) in decoding:
                continue
            self.tokens["computed"] += req.extend_len
            if req.rid not in self._outputs:
                self._outputs[req.rid] = 0
                self.tokens["cached"] += req.cached_tokens

    def _count_output(self, req: Req) -> None:
        if req.rid in self._outputs:
            output_tokens = answer_tokens(req)
            self.tokens["output"] += output_tokens - self._outputs[req.rid]
            self._outputs[req.rid] = output_tokens

    def _sample(self, now_s: float) -> None:
        if self._queue.taken or len(self._queue):
            self._busy_s += now_s - self._now_s if self._now_s else 0.0
        self._now_s = now_s
        if self._samples and self._busy_s < self._samples[-1][0] + 1.0:
            return
        self._samples.append((self._busy_s, self.tokens.total()))
        while self._samples[0][0] < self._busy_s - _WINDOW_S:
            self._samples.popleft()

    @property
    def expected_tokens_per_s(self) -> float | None:
        """Tokens as the queue expects them that were served a second, over the last minute in
        which there was offline work; None before there was any to speak of."""
        if len(self._samples) < 5:
            return None
        (since_s, before), (until_s, after) = self._samples[0], self._samples[-1]
        took = self._took_tokens / self._expected_tokens if self._expected_tokens else 1.0
        return (after - before) / (until_s - since_s) / took
