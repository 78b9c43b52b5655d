"""The arrival channel: tells the scheduler of an online request before it is tokenized.

PUSH in the tokenizer process, or in each of several; PULL in the scheduler (`engine/inbox.py`), one
msgpack-encoded `Arrival` a message, over an ipc endpoint that all derive from SGLang's instance id.
It only ever carries hints: a message that does not get through costs a little latency, never a
request.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time

import msgspec
import zmq

__all__ = ["Arrival", "ArrivalSender", "arrival_endpoint"]

logger = logging.getLogger(__name__)

_HIGH_WATER_MARK = 10_000


class Arrival(msgspec.Struct, frozen=True, array_like=True):
    """An online request has been received and is about to be tokenized.

    Args:
        rids: its request ids; several for one HTTP request with several prompts.
        sent_ns: CLOCK_MONOTONIC of the sender, in nanoseconds; one clock for a machine.
    """

    rids: tuple[str, ...]
    sent_ns: int


def arrival_endpoint(instance_id: str) -> str:
    """The ipc endpoint of the server whose `PortArgs.instance_id` this is."""
    return f"ipc://{os.path.join(tempfile.gettempdir(), f'conserve-arrivals-{instance_id}')}"


class ArrivalSender:
    """A tokenizer process's end. Never blocks and never raises: see the module's docstring."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, _HIGH_WATER_MARK)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # or it would keep for later what is of now
        self._socket.connect(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self.dropped = 0

    def send(self, rids: tuple[str, ...]) -> None:
        """Announce an online request; dropped and counted when the scheduler does not keep up."""
        if not rids:
            return
        message = self._encoder.encode(Arrival(rids, time.monotonic_ns()))
        try:
            self._socket.send(message, zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1

    def close(self) -> None:
        """Release the socket."""
        self._socket.close()
