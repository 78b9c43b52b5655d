"""Latencies of online requests over the last minutes, in fixed memory.

Counts in buckets that are a fiftieth wide, so that any percentile is right to within a hundredth,
for ten slices of half a minute each; the oldest is emptied as a new one begins. Nothing is
allocated when a latency is counted.
"""

from __future__ import annotations

from array import array
from math import exp, log

import numpy as np

from conserve_sgl.status.record import Latency

__all__ = ["NO_QUANTILES", "WINDOW_S", "LatencyWindow", "OnlineLatencies", "unseen"]

WINDOW_S = 300.0
"""What is kept: this, less up to a slice."""

NO_QUANTILES: dict[str, dict[str, float | None]] = {"ttft": {}, "tpot": {}, "itl": {}}
"""Those of a server that keeps no latencies."""

_SLICES = 10
_SLICE_S = WINDOW_S / _SLICES
_WIDTH = log(1.02)
_SHORTEST_S, _LONGEST_S = 1e-5, 1e5
_FIRST = log(_SHORTEST_S)
_BUCKETS = int((log(_LONGEST_S) - _FIRST) / _WIDTH) + 2
_MOST_FRESH = 4096
_EMPTY = array("Q", bytes(8 * _BUCKETS))


def unseen(objective_s: float | None) -> Latency:
    """Of a latency without samples."""
    known = {"p50_ms": None, "p99_ms": None, "within": None}
    return Latency(objective_ms=_milliseconds(objective_s), samples=0, **known)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


class LatencyWindow:
    """Counts of one latency."""

    def __init__(self) -> None:
        self._counts = array("Q", bytes(8 * _BUCKETS * _SLICES))
        self._slice = 0
        self._began_s: float | None = None

    def add(self, now_s: float, seconds: float, count: int = 1) -> None:
        """`count` samples of `seconds`, seen now, on a monotonic clock."""
        self._turn(now_s)
        within = min(max(seconds, _SHORTEST_S), _LONGEST_S)
        bucket = int((log(within) - _FIRST) / _WIDTH)
        self._counts[self._slice * _BUCKETS + bucket] += count

    def read(self, now_s: float, objective_s: float | None) -> Latency:
        """What was seen in the window, against an objective."""
        self._turn(now_s)
        counts = np.frombuffer(self._counts, dtype=np.uint64).reshape(_SLICES, _BUCKETS).sum(axis=0)
        below = np.cumsum(counts)
        if not (samples := int(below[-1])):
            return unseen(objective_s)
        return Latency(
            objective_ms=_milliseconds(objective_s),
            p50_ms=_percentile_ms(below, 0.50),
            p99_ms=_percentile_ms(below, 0.99),
            samples=samples,
            within=_share_below(below, objective_s) if objective_s else None,
        )

    def _turn(self, now_s: float) -> None:
        if self._began_s is None:
            self._began_s = now_s
        turns = int((now_s - self._began_s) / _SLICE_S)
        for _ in range(min(turns, _SLICES)):
            self._slice = (self._slice + 1) % _SLICES
            self._counts[self._slice * _BUCKETS : (self._slice + 1) * _BUCKETS] = _EMPTY
        if turns > 0:
            self._began_s += turns * _SLICE_S


def _quantiles(seen: Latency) -> dict[str, float | None]:
    milliseconds = {"0.5": seen.p50_ms, "0.99": seen.p99_ms}
    return {name: None if ms is None else ms / 1e3 for name, ms in milliseconds.items()}


def _percentile_ms(below: np.ndarray, share: float) -> float:
    bucket = int(np.searchsorted(below, share * float(below[-1])))
    return 1e3 * exp(_FIRST + (bucket + 0.5) * _WIDTH)


def _share_below(below: np.ndarray, seconds: float) -> float:
    within = min(max(seconds, _SHORTEST_S), _LONGEST_S)
    bucket = int((log(within) - _FIRST) / _WIDTH)
    return float(below[bucket]) / float(below[-1])


class OnlineLatencies:
    """Time to first token, per token, and between two tokens, of all online requests.

    The rows of an engine decode together: what they waited between two tokens is one time for all
    that decoded in both steps, and is counted once with their number.
    """

    def __init__(self) -> None:
        self.ttft, self.tpot, self.itl = LatencyWindow(), LatencyWindow(), LatencyWindow()
        self._decoded_s: float | None = None
        self._fresh: list[float] = []  # when each row that has not decoded yet got its first token

    def quantiles(self, now_s: float) -> dict[str, dict[str, float | None]]:
        """P50 and P99 of each in seconds, by name and quantile; None without samples."""
        windows = {"ttft": self.ttft, "tpot": self.tpot, "itl": self.itl}
        return {name: _quantiles(window.read(now_s, None)) for name, window in windows.items()}

    def first_token(self, now_s: float, ttft_s: float, *, goes_on: bool) -> None:
        """A request got its first token, `ttft_s` after it was announced; more may come."""
        self.ttft.add(now_s, ttft_s)
        if goes_on and len(self._fresh) < _MOST_FRESH:
            self._fresh.append(now_s)

    def ended(self, now_s: float, tpot_s: float | None) -> None:
        """A request ended; None where it had but one token."""
        if tpot_s is not None:
            self.tpot.add(now_s, tpot_s)

    def decoded(self, now_s: float, rows: int) -> None:
        """So many online rows got one more token each; to be told of it before the first tokens of
        the same step."""
        fresh = self._fresh[:rows]
        for first_s in fresh:
            self.itl.add(now_s, now_s - first_s)
        if self._decoded_s is not None and rows > len(fresh):
            self.itl.add(now_s, now_s - self._decoded_s, rows - len(fresh))
        self._fresh.clear()
        self._decoded_s = now_s
