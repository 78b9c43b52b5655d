"""Offline work that waits and gets nothing: noticed, with the bound that held it.

A benchmark once showed every objective kept and 2 % of the offline work done, and nothing in the
server said so. Whatever the cause is, an operator hears of it.
"""

from __future__ import annotations

from conserve_sgl.policy.bound import Bound

__all__ = ["Starvation"]

_LIMIT_S = 30.0


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
