"""A share of the device's time that offline work gets whatever the online objectives leave.

For operators who want a trickle of it although their objectives cannot be met, or only just.
"""

from __future__ import annotations

__all__ = ["Floor"]

_MOST_S = 0.5
"""What may be saved up: a chunk that is worth a step, and no burst after a long pause."""


class Floor:
    """What offline work has earned and not spent, in seconds of the device.

    Args:
        share: of the time in which offline work is there to run, 0 to 1.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._seen_s: float | None = None
        self.owed_s = 0.0

    def earn(self, now_s: float, *, waits: bool) -> None:
        """Time went by until `now_s`; `waits` says whether there is offline work."""
        if self._share and waits and self._seen_s is not None:
            earned_s = self._share * max(now_s - self._seen_s, 0.0)
            self.owed_s = min(self.owed_s + earned_s, _MOST_S)
        self._seen_s = now_s if waits else None

    def spend(self, seconds: float) -> None:
        """Offline work has so much of a step."""
        self.owed_s = max(self.owed_s - seconds, 0.0)
