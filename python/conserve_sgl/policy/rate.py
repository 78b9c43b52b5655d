"""A rate, smoothed over time."""

from __future__ import annotations

from math import exp

__all__ = ["Rate"]

_SMOOTH_S = 30.0
"""Time constant."""


class Rate:
    """A moving average over time, which begins with its first value."""

    def __init__(self) -> None:
        self.value = 0.0
        self._weight = 0.0

    def follow(self, value: float, seconds: float) -> None:
        """It was `value` for so long."""
        fades = exp(-seconds / _SMOOTH_S)
        self._weight = fades * self._weight + 1 - fades
        self.value += (1 - fades) / self._weight * (value - self.value)
