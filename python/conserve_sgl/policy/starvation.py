"""Offline work that waits and gets nothing: noticed, with the bound that held it.

A benchmark once showed every objective kept and 2 % of the offline work done, and nothing in the
server said so. Whatever the cause is, an operator hears of it.
"""

from __future__ import annotations

from enum import StrEnum

__all__ = ["Bound", "Starvation"]

_LIMIT_S = 30.0


class Bound(StrEnum):
    """What bounds offline work in a step, in the order in which they are looked at. The last is
    found where the plan let some in, and none of what waits could be."""

    ONLINE_PROMPTS = "online prompts"
    ARRIVAL = "an arrival"
    TTFT = "slo.ttft"
    TPOT = "slo.tpot"
    GAP = "slo.longest_gap"
    YIELD = "slo.yield_ms"
    ADAPTERS = "adapters"

    @property
    def remedy(self) -> str:
        """A sentence: why, and what it would take."""
        return _REMEDIES[self]


_REMEDIES = {
    Bound.ONLINE_PROMPTS: "online prompts have waited all along, and go first: this server is full",
    Bound.ARRIVAL: "online requests are announced all the time, and none gets as far as its prompt",
    Bound.TTFT: "a step with offline work would keep an arrival waiting longer than slo.ttft "
    "allows; a larger slo.ttft, or a faster step, makes room, and offline.min_share takes it",
    Bound.TPOT: "the online rows have no time to spare within slo.tpot; a larger slo.tpot, or "
    "fewer online requests at a time, makes room, and offline.min_share takes it",
    Bound.GAP: "no step with offline work is shorter than slo.longest_gap; a larger one makes room",
    Bound.YIELD: "no offline step is shorter than slo.yield_ms; a larger one makes room",
    Bound.ADAPTERS: "a batch has no place for its adapters beside those of online requests; a "
    "larger --max-loras-per-batch makes room",
}


class Starvation:
    """Counts the seconds in which offline work waited and none ran."""

    def __init__(self) -> None:
        self._fed_s: float | None = None
        self._said_s = 0.0
        self.seconds = 0.0

    def look(self, now_s: float, bound: Bound, *, waits: bool, runs: bool) -> str | None:
        """Take in a step; a sentence when it is time to say so: after 30 s, and twice as late each
        time after that.

        Args:
            now_s: a monotonic clock.
            bound: what bounds the step.
            waits: whether there is offline work that could run.
            runs: whether the step has some in it.
        """
        if runs or not waits or self._fed_s is None:
            self._fed_s, self._said_s, self.seconds = now_s, _LIMIT_S, 0.0
            return None
        self.seconds = now_s - self._fed_s
        if self.seconds < self._said_s:
            return None
        self._said_s = 2 * self.seconds
        return f"offline work has waited for {self.seconds:.0f} s and got nothing: {bound.remedy}"
