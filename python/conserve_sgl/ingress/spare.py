"""The scheduler tells the HTTP processes what offline work it would take now.

PUB in the scheduler process, SUB in each tokenizer and HTTP process, one msgpack-encoded `SpareNow`
a message, of which the receiver keeps the latest, over an ipc endpoint that all derive from
SGLang's instance id. Read where it is needed, without a task of its own.
"""

from __future__ import annotations

import os
import tempfile
import time

import msgspec
import zmq

from conserve_sgl.ingress.in_hand import InHand

__all__ = ["SpareNow", "SpareReceiver", "SpareRoom", "SpareSender", "spare_endpoint"]

STALE_S = 5.0
"""A message that is older says nothing: the engine stands still, or sleeps."""


class SpareNow(msgspec.Struct, frozen=True, array_like=True):
    """What the engine would take.

    Args:
        requests: offline requests.
        at_s: when, in seconds of `time.monotonic`, which is one clock for a machine.
        held: whether an operator keeps offline work from running: then it is none until the next
            message, however old this one is.
    """

    requests: int
    at_s: float
    held: bool = False


def spare_endpoint(instance_id: str) -> str:
    """The ipc endpoint of the server whose `PortArgs.instance_id` this is."""
    return f"ipc://{os.path.join(tempfile.gettempdir(), f'conserve-spare-{instance_id}')}"


class SpareSender:
    """The scheduler's end. Never blocks."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.PUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)

    def send(self, requests: int, *, held: bool) -> None:
        """Publish what the engine would take now, and whether offline work is held."""
        message = msgspec.msgpack.encode(SpareNow(requests, time.monotonic(), held))
        self._socket.send(message, zmq.NOBLOCK)

    def close(self) -> None:
        """Release the socket."""
        self._socket.close()


class SpareReceiver:
    """The HTTP process's end."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.CONFLATE, 1)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(endpoint)
        self._decoder = msgspec.msgpack.Decoder(SpareNow)
        self._latest: SpareNow | None = None

    def latest(self) -> SpareNow | None:
        """The latest message; None before there was one."""
        while self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            self._latest = self._decoder.decode(self._socket.recv(zmq.NOBLOCK))
        return self._latest

    def close(self) -> None:
        """Release the socket."""
        self._socket.close()


class SpareRoom:
    """What is left of the latest message: less what went to the engine since.

    Args:
        receiver: of the messages.
        in_hand: counts what went.
    """

    def __init__(self, receiver: SpareReceiver, in_hand: InHand) -> None:
        self._receiver = receiver
        self._in_hand = in_hand

    def left(self) -> int | None:
        """Offline requests that the engine would take now; None where nobody knows: there was no
        message, or none of late. To be asked before each that goes to the engine, too: what goes
        counts from the first look at a message on."""
        latest = self._receiver.latest()
        if latest is None:
            return None
        went = self._in_hand.begun_since(int(latest.at_s * 1e9))
        if latest.held:
            return 0
        if time.monotonic() - latest.at_s > STALE_S:
            return None
        return max(latest.requests - went, 0)
