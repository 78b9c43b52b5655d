"""Offline requests that the HTTP processes of a server have in hand, counted over all of them.

With `--tokenizer-worker-num` several processes take requests, and what a server takes is counted
over all. Each has a line of its own in a small file that all of them map into memory, writes that
one alone and reads everybody's: no lock, no message. A line is its own by a lock on one byte of the
file, of which the kernel lets go when the process ends, whichever way; the next process that starts
goes on with the line.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

from conserve_sgl.errors import ServerError

__all__ = ["MOST_PROCESSES", "InHand", "in_hand_file"]

MOST_PROCESSES = 255
"""HTTP processes of a server, those that are about to end included."""

_SHAPE = (1 + MOST_PROCESSES, 2)
_NOW, _EVER = 0, 1
"""Of a process's line: its requests in hand, and all that it ever had."""
_MARK, _THEN = 0, 1
"""Of the line before all others: the latest mark of `begun_since`, and all requests until then."""


def in_hand_file(instance_id: str) -> Path:
    """The file of the server whose `PortArgs.instance_id` this is."""
    return Path(tempfile.gettempdir()) / f"conserve-in-hand-{instance_id}"


class InHand:
    """The counts of this process, alone until `share`."""

    def __init__(self) -> None:
        self._lines = np.zeros((2, 2), np.int64)
        self._mine = self._lines[1]

    def share(self, path: Path) -> None:
        """Count together with all processes that share `path`, which is made if absent. To be
        called once, with nothing in hand.

        Raises:
            ServerError: as many processes as it has lines for share it, or it cannot be used.
        """
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.ftruncate(fd, int(np.prod(_SHAPE)) * 8)
            line = _take_line(fd)
            memory = mmap.mmap(fd, 0)
        except OSError as e:
            raise ServerError(f"cannot share {path}: {e.strerror or e}") from e
        self._file = fd  # open as long as this process runs: its lock is the claim to the line
        self._lines = np.frombuffer(memory, np.int64).reshape(_SHAPE)
        self._mine = self._lines[line]
        self._mine[_NOW] = 0

    def begin(self) -> None:
        """One more is in hand here."""
        self._mine[_EVER] += 1
        self._mine[_NOW] += 1

    def end(self) -> None:
        """One less is."""
        self._mine[_NOW] -= 1

    def now(self) -> int:
        """Requests in hand, of all processes."""
        return int(self._lines[1:, _NOW].sum())

    def begun_since(self, mark: int) -> int:
        """Requests that all processes began since the first of them asked with `mark`, or a later
        one; a mark is a time, in any unit."""
        ever, head = int(self._lines[1:, _EVER].sum()), self._lines[0]
        if mark > head[_MARK]:
            head[_THEN], head[_MARK] = ever, mark
        return ever - int(head[_THEN])


def _take_line(fd: int) -> int:
    for line in range(1, 1 + MOST_PROCESSES):
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, line)
        except (BlockingIOError, PermissionError):
            continue
        return line
    raise ServerError(f"more than {MOST_PROCESSES} tokenizer workers")
