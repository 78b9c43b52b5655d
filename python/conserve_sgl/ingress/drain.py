"""How long a client that was told "full" should wait, from how fast places become free."""

from __future__ import annotations

from collections import deque
from math import ceil

__all__ = ["Drain"]

_WINDOW_S = 60.0
# OpenAI's client takes a longer one for a mistake, and comes back at once.
_LONGEST_S = 60


class Drain:
    """Hands out the places that will become free, one after the other.

    Each refused client is given the time of a place of its own, so that a thousand of them do
    not come back in the same second for the one place that is free by then.

    Args:
        shortest_s: the shortest wait, and the wait while nobody knows how fast places become
            free. The longest one is a minute, or this if it is longer.
    """

    def __init__(self, shortest_s: int) -> None:
        self.shortest_s = shortest_s
        self._longest_s = max(_LONGEST_S, shortest_s)
        self._freed_s: deque[float] = deque(maxlen=1024)
        self._next_place_s = 0.0

    def freed(self, now_s: float) -> None:
        """A place has become free."""
        self._freed_s.append(now_s)

    def wait_s(self, now_s: float) -> int:
        """Whole seconds that the client in hand should wait."""
        per_place_s = self._per_place_s(now_s)
        if per_place_s is None:
            return self.shortest_s
        latest_s = now_s + self._longest_s
        self._next_place_s = min(max(self._next_place_s, now_s) + per_place_s, latest_s)
        # At the limit the difference of two clock readings may be a rounding error above it.
        wait_s = min(ceil(self._next_place_s - now_s), self._longest_s)
        return max(self.shortest_s, wait_s)

    def _per_place_s(self, now_s: float) -> float | None:
        """Seconds from one place to the next, over the last minute; None without any."""
        while self._freed_s and self._freed_s[0] < now_s - _WINDOW_S:
            self._freed_s.popleft()
        if not self._freed_s:
            return None
        return max(now_s - self._freed_s[0], 1.0) / len(self._freed_s)
