"""A margin that outcomes move: what online requests got, not what a model said they would get."""

from __future__ import annotations

__all__ = ["Margin"]

_LATE_SHARE = 0.01
"""Of the requests: so many may be late for the margin to stay where it is."""

_STEP = 0.05
"""What one late request takes away."""


class Margin:
    """The share of the time to spare that offline work may use, `share`.

    A request that is late takes a twentieth away, and one that is in time gives a hundredth of that
    back. So the share settles where one in a hundred is late, or stays at `most` where fewer are:
    an error of the model costs some offline work and never the promise for long.

    Args:
        most: where it begins, and what it never exceeds.
        least: what it never falls below: something has to run for an outcome to be seen.
    """

    def __init__(self, *, most: float, least: float) -> None:
        self._most = most
        self._least = least
        self.share = most

    def saw(self, *, late: bool) -> None:
        """Take in one request that ended."""
        change = -_STEP if late else _STEP * _LATE_SHARE / (1 - _LATE_SHARE)
        self.share = min(max(self.share + change, self._least), self._most)
