"""The queue at a moment, for metrics."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil, inf

import msgspec

from conserve_sgl.policy.offline_queue.lane import Lane

__all__ = ["Backlog", "at_risk"]


class Backlog(msgspec.Struct, frozen=True, kw_only=True):
    """The queue at a moment, for metrics.

    Args:
        requests: waiting.
        tokens: that they are expected to take.
        jobs: that have a request waiting.
        oldest_wait_s: since the arrival of the request that arrived first; 0.0 when none waits.
        at_risk: waiting requests that will miss their deadline, served earliest deadline first
            at the rate asked about.
    """

    requests: int
    tokens: int
    jobs: int
    oldest_wait_s: float
    at_risk: int


def at_risk(dated: Iterable[Lane], now_s: float, tokens_per_s: float | None) -> int:
    """Waiting requests of lanes in the order of their deadlines that will miss theirs; None where
    nobody knows the rate, and then only what is late already."""
    tokens_per_s = inf if tokens_per_s is None else tokens_per_s
    requests, ahead_tokens = 0, 0
    for lane in dated:
        ahead_tokens += lane.waiting_tokens
        left_s = max(0.0, lane.deadline_s - now_s)  # in this order 0.0 where now_s is none
        in_time_tokens = left_s * tokens_per_s if left_s and tokens_per_s else 0.0
        late_tokens = min(max(ahead_tokens - in_time_tokens, 0.0), lane.waiting_tokens)
        requests += ceil(late_tokens * lane.waiting / lane.waiting_tokens)
    return requests
