"""Spare capacity: how much more offline work an engine would take now.

A fleet's planner and whoever spreads a batch over many servers ask for it. It is measured, not
predicted: what the engine served while offline work waited all along is what it can do beside its
online load of late, and what it serves beyond that is nothing until the load changes.
"""

from __future__ import annotations

from math import ceil

import msgspec

from conserve_sgl.policy.rate import Rate

__all__ = ["Spare", "SpareMeter"]

AHEAD_S = 4.0
"""Seconds of work that should wait in the queue, so that rows which end find the next request:
clients take a moment to send one."""

_LEAST_AHEAD = 4
"""Requests that may wait in any case: of long ones less than one ends in `AHEAD_S`."""


class Spare(msgspec.Struct, frozen=True):
    """What an engine would take beyond what it has.

    Args:
        requests: offline requests.
        tokens_per_s: offline tokens a second, prompts and answers; None while offline work has
            never waited, since nobody knows then.
        measured_s: when that was last measured, on a monotonic clock; None like it.
    """

    requests: int
    tokens_per_s: float | None = None
    measured_s: float | None = None


class SpareMeter:
    """Measures it, from one look a second or so."""

    def __init__(self) -> None:
        self._seen_s: float | None = None
        self._tokens = self._finished = 0
        self._fed = False
        self._used = Rate()
        self._finishing = Rate()
        self._able = Rate()
        self._able_s: float | None = None

    def look(
        self,
        now_s: float,
        *,
        tokens: int,
        finished: int,
        waiting: int,
        resident: int,
        max_rows: int,
        held: bool,
    ) -> Spare:
        """Take in what happened since the last look.

        Args:
            now_s: a monotonic clock.
            tokens: offline tokens served since the start.
            finished: offline requests answered since the start.
            waiting: offline requests without a row.
            resident: those with one.
            max_rows: the most rows that offline requests may hold.
            held: whether an operator keeps offline work from running.
        """
        seconds = 0.0 if self._seen_s is None else now_s - self._seen_s
        if seconds > 0:
            served = (tokens - self._tokens) / seconds
            self._used.follow(served, seconds)
            self._finishing.follow((finished - self._finished) / seconds, seconds)
            if self._fed and waiting and not held:
                self._able.follow(served, seconds)
                self._able_s = now_s
        self._seen_s, self._tokens, self._finished = now_s, tokens, finished
        self._fed = waiting > 0 and not held
        return Spare(self._requests(waiting, resident, max_rows, held), *self._rate(held))

    def _requests(self, waiting: int, resident: int, max_rows: int, held: bool) -> int:
        if held:
            return 0
        ahead = max(ceil(AHEAD_S * self._finishing.value), _LEAST_AHEAD)
        # Rows that stay free while requests wait are free for want of KV or of time.
        free_rows = 0 if waiting else max(max_rows - resident, 0)
        return max(ahead + free_rows - waiting, 0)

    def _rate(self, held: bool) -> tuple[float | None, float | None]:
        if self._able_s is None:
            return None, None
        more = 0.0 if held else max(self._able.value - self._used.value, 0.0)
        return more, self._able_s
