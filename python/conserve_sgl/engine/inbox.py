"""The scheduler's end of the arrival channel."""

from __future__ import annotations

import time
from collections import deque

import msgspec
import zmq

from conserve_sgl.ingress.arrival import Arrival

__all__ = ["ArrivalInbox"]

_KEPT_LATENCIES = 4096
_KEPT_EARLY = 1024


class ArrivalInbox:
    """Knows which online requests are announced but not yet in the scheduler.

    Args:
        endpoint: of the `ArrivalSender`s.
        forget_after_s: an announcement counts no longer than this. A request that was refused
            while it was tokenized never reaches the scheduler, and must not hold offline work
            back for ever.
    """

    def __init__(self, endpoint: str, *, forget_after_s: float = 0.25) -> None:
        self._socket = zmq.Context.instance().socket(zmq.PULL)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)
        self._decoder = msgspec.msgpack.Decoder(Arrival)
        self._forget_after_ns = int(forget_after_s * 1e9)
        self._announced: dict[str, tuple[int, int]] = {}  # rid: (sent, seen)
        # Requests that overtook their own announcement: two sockets keep no order between them.
        self._early: dict[str, None] = {}
        self._latencies_ns: deque[int] = deque(maxlen=_KEPT_LATENCIES)
        self.received = 0
        self._reported = 0

    def __len__(self) -> int:
        return len(self._announced)

    def poll(self) -> None:
        """Read what has arrived, without waiting, and forget what is overdue."""
        while self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            arrival = self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
            now_ns = time.monotonic_ns()
            self.received += 1
            self._latencies_ns.append(now_ns - arrival.sent_ns)
            for rid in arrival.rids:
                if rid in self._early:
                    del self._early[rid]
                else:
                    self._announced[rid] = arrival.sent_ns, now_ns
        self._forget_overdue()

    def _forget_overdue(self) -> None:
        now_ns = time.monotonic_ns()
        while self._announced:
            rid, (_, seen_ns) = next(iter(self._announced.items()))
            if now_ns - seen_ns <= self._forget_after_ns:
                break
            del self._announced[rid]

    def oldest_sent_s(self) -> float | None:
        """When the oldest request that is announced and not here yet was announced, or None.

        In seconds of `time.monotonic`.
        """
        return next((sent_ns / 1e9 for sent_ns, _ in self._announced.values()), None)

    def keep_for(self, seconds: float) -> None:
        """Let announcements count for at least `seconds`."""
        self._forget_after_ns = max(self._forget_after_ns, int(seconds * 1e9))

    def reached(self, rid: str) -> float | None:
        """The request itself is here: it no longer counts as arriving.

        Returns:
            When it was announced, in seconds of `time.monotonic`; None when it was not.
        """
        if (announced := self._announced.pop(rid, None)) is not None:
            return announced[0] / 1e9
        self._early[rid] = None
        if len(self._early) > _KEPT_EARLY:
            del self._early[next(iter(self._early))]
        return None

    def latencies_ms(self) -> list[float]:
        """Milliseconds from send to poll of the latest arrivals, oldest first."""
        return [ns / 1e6 for ns in self._latencies_ns]

    def new_latencies_ms(self) -> list[float]:
        """Those since the last call, at most the latest few thousand."""
        new, self._reported = self.received - self._reported, self.received
        return self.latencies_ms()[-new:] if new else []

    def close(self) -> None:
        """Release the socket."""
        self._socket.close()
