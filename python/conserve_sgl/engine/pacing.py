"""Keeps the host a bounded number of slices ahead of the device.

Launching a slice on a GPU returns at once, so a host that only looked at the arrival socket between
launches would have queued the whole prefill before anything arrives. An event marks the end of
each slice; the host waits for the oldest one, looking at the socket meanwhile, before it launches
another slice than `depth` outstanding ones.

    depth 1   the device idles between slices, while the host decides; a yield waits for one slice
    depth 2   the next slice is queued while one runs; a yield waits for two
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

__all__ = ["DeviceEvent", "Pacer"]


class DeviceEvent(Protocol):
    """The part of `torch.cuda.Event` that is used."""

    def query(self) -> bool:
        """Whether the device has got this far."""
        ...


class _Slice(NamedTuple):
    event: DeviceEvent | None
    launched_s: float
    layers: int


class Pacer:
    """Launches slices and waits for them.

    Args:
        record: marks the end of what was launched so far; None on a device that runs
            synchronously, where a slice is over when its launch returns.
        depth: slices that may be outstanding, at least 1.
        clock: a monotonic clock, in seconds.
        while_waiting: called again and again while the host waits.
        on_done: told the layers and the seconds of each slice, in order.

    `host_stalls` counts launches that found the device idle: it had to wait for the host.
    """

    def __init__(
        self,
        *,
        record: Callable[[], DeviceEvent] | None,
        depth: int,
        clock: Callable[[], float],
        while_waiting: Callable[[], None],
        on_done: Callable[[int, float], None],
    ) -> None:
        if depth < 1:
            raise ValueError(f"at least one slice must be able to run, not {depth}")
        self.depth = depth if record is not None else 1
        self.host_stalls = 0
        self._record = record
        self._clock = clock
        self._while_waiting = while_waiting
        self._on_done = on_done
        self._outstanding: deque[_Slice] = deque()
        self._last_done_s = float("-inf")

    def launch(self, run: Callable[[], Any], layers: int) -> Any:
        """Run or queue a slice of `layers` layers; returns what `run` does.

        On return fewer than `depth` slices are outstanding.
        """
        if self._outstanding and self._is_done(self._outstanding[-1]):
            self.host_stalls += 1
        launched_s = self._clock()
        result = run()
        event = None if self._record is None else self._record()
        self._outstanding.append(_Slice(event, launched_s, layers))
        self._wait(self.depth - 1)
        return result

    def forget(self) -> None:
        """Slices still outstanding belong to a batch that is done: they pace nothing more."""
        self._outstanding.clear()

    def drain(self) -> None:
        """Wait until the device has done everything that was launched."""
        self._wait(0)

    def _wait(self, outstanding: int) -> None:
        while len(self._outstanding) > outstanding:
            while not self._is_done(self._outstanding[0]):
                self._while_waiting()
            self._done(self._outstanding.popleft())

    def _done(self, piece: _Slice) -> None:
        now_s = self._clock()
        began_s = max(piece.launched_s, self._last_done_s)
        self._last_done_s = now_s
        self._on_done(piece.layers, now_s - began_s)

    @staticmethod
    def _is_done(piece: _Slice) -> bool:
        return piece.event is None or piece.event.query()
