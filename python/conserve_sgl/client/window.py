"""How many requests a server gets at a time.

The congestion window of TCP (slow start, additive increase, multiplicative decrease; RFC 5681), in
requests: a refusal cuts it, answers let it grow, by one each until the first refusal. A server that
says what else it would take (`x-sgl-conserve-spare`) is believed: half of that is added at once,
the other half is left to other clients, who were told the same. Where it is nothing the window
grows by one a round all the same, as long as nothing was refused: a server that queues shares its
time out among jobs by what they have there.
"""

from __future__ import annotations

from math import inf

__all__ = ["Window"]

_CUT = 0.7
_ROUND_S = 1.0
"""Refusals of so long are one: they were in flight together."""


class Window:
    """The window of one server.

    Args:
        most: requests in flight at most.
        begin: at first.
    """

    def __init__(self, most: int, begin: int) -> None:
        self._most = most
        self._size = float(begin)
        self._cut_s = -inf

    @property
    def size(self) -> int:
        """Requests that may be in flight now, at least one."""
        return int(self._size)

    def answered(self, in_flight: int, spare: int | None) -> None:
        """A request was answered.

        Args:
            in_flight: this one included.
            spare: what the server says that it would take beyond what it has and what is on its
                way to it, or None.
        """
        refuses = self._cut_s > -inf
        size = self._size + (1 / self._size if refuses or spare is not None else 1)
        if spare is not None:
            says = float(in_flight + spare // 2)
            size = says if refuses else max(size, says)
        self._size = min(max(size, 1.0), float(self._most))

    def refused(self, in_flight: int, now_s: float) -> None:
        """A request was answered 429 or 503; `in_flight` counts it, `now_s` is monotonic."""
        if now_s - self._cut_s < _ROUND_S:
            return
        self._cut_s = now_s
        self._size = max(_CUT * min(self._size, in_flight), 1.0)
