"""The clock of an emulated device: what was put on it, and when it is done with it.

A launch returns when the host has launched all of it, which may be at once. It begins when what was
put on the same stream before it is done, and, for a computation, when the device's one set of
compute units is free; it ends so many seconds later. An event remembers when what its stream held
is done, and who waits for it waits for that time. Values are computed by the host at launch: only
the time in which they may be looked at is the device's.

`Stream`, `Event` and `StreamContext` have the interface of their namesakes in `torch.cpu`, which do
nothing; `classes_of` makes those of one queue. Not for several threads that launch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from typing import Any, NamedTuple, Self

__all__ = ["Classes", "DeviceQueue", "Event", "Stream", "StreamContext", "classes_of"]


class DeviceQueue:
    """One device's streams and compute units.

    Args:
        clock: seconds, the host's.
        sleep: lets the host wait for so many of them.

    `free_s` is when the compute units are done with all that was launched so far.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._clock = clock
        self._sleep = sleep
        self.free_s = self._last_s = -inf
        self.classes = classes_of(self)
        self.current: Stream = self.classes.stream()

    def compute(self, seconds: float) -> None:
        """Launch a computation on the current stream."""
        self.free_s = self._put(seconds, not_before_s=self.free_s)

    def copy(self, seconds: float) -> None:
        """Launch a copy on the current stream; it runs beside computations."""
        self._put(seconds, not_before_s=-inf)

    def hold(self, seconds: float) -> None:
        """What is computed next begins so much later."""
        self.free_s = max(self._clock(), self.free_s) + seconds

    def _put(self, seconds: float, *, not_before_s: float) -> float:
        stream = self.current
        begin_s = max(self._clock(), stream.done_s, not_before_s)
        stream.done_s = begin_s + seconds
        self._last_s = max(self._last_s, stream.done_s)
        return stream.done_s

    def launch_until(self, at_s: float) -> None:
        """Launching what was put on the current stream last takes the host until `at_s`, and the
        device is not done with it before."""
        self.wait_until(at_s)
        if at_s > self.current.done_s:
            self.current.done_s = self.free_s = at_s
            self._last_s = max(self._last_s, at_s)

    def now_s(self) -> float:
        """The host's clock."""
        return self._clock()

    def is_past(self, at_s: float) -> bool:
        return self._clock() >= at_s

    def wait_until(self, at_s: float) -> None:
        """Let the host wait until `at_s`."""
        while (left_s := at_s - self._clock()) > 0:
            self._sleep(left_s)

    def synchronize(self) -> None:
        """Let the host wait for all that was launched."""
        self.wait_until(self._last_s)


class Stream:
    """What is put on it runs in order; `done_s` is when all of it is done."""

    queue: DeviceQueue

    def __init__(self, priority: int = 0) -> None:  # noqa: ARG002  one stream computes
        self.done_s = -inf

    def wait_stream(self, stream: Stream) -> None:
        """What is put on this stream from now on waits for all that is on `stream` now."""
        self.done_s = max(self.done_s, stream.done_s)

    def wait_event(self, event: Event) -> None:
        self.done_s = max(self.done_s, event.at_s)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or self.queue.classes.event()
        event.record(self)
        return event

    def query(self) -> bool:
        return self.queue.is_past(self.done_s)

    def synchronize(self) -> None:
        self.queue.wait_until(self.done_s)


class Event:
    """`at_s` is when what its stream held is done; one that was never recorded is past."""

    queue: DeviceQueue

    def __init__(self, **_flags: Any) -> None:
        self.at_s = -inf

    def record(self, stream: Stream | None = None) -> None:
        self.at_s = (stream or self.queue.current).done_s

    def query(self) -> bool:
        return self.queue.is_past(self.at_s)

    def synchronize(self) -> None:
        self.queue.wait_until(self.at_s)

    def wait(self, stream: Stream | None = None) -> None:
        """What is put on `stream` from now on waits for this event."""
        (stream or self.queue.current).wait_event(self)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this event to `end`; 0 where either was recorded on an empty stream."""
        elapsed_s = end.at_s - self.at_s
        return 1e3 * elapsed_s if 0 < elapsed_s < inf else 0.0


class StreamContext:
    """Within, `stream` is the current one; None changes nothing."""

    queue: DeviceQueue

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream
        self._outer: list[Stream] = []  # SGLang enters one context again and again

    def __enter__(self) -> Self:
        self._outer.append(self.queue.current)
        self.queue.current = self.stream or self.queue.current
        return self

    def __exit__(self, *_exc: object) -> None:
        self.queue.current = self._outer.pop()


class Classes(NamedTuple):
    """The classes of one queue."""

    stream: type[Stream]
    event: type[Event]
    context: type[StreamContext]


def classes_of(queue: DeviceQueue) -> Classes:
    """`Stream`, `Event` and `StreamContext` whose instances belong to `queue`."""
    bound = (type(c.__name__, (c,), {"queue": queue}) for c in (Stream, Event, StreamContext))
    return Classes(*bound)
