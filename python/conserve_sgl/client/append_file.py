"""A JSONL file that survives crashes and full disks, and is gone on with by the next run."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from conserve_sgl.errors import JobError
from conserve_sgl.json_lines import json_line

__all__ = ["AppendFile", "cannot_write"]


class AppendFile:
    """A JSONL file that is only appended to, a whole line at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._size_bytes = os.fstat(self._fd).st_size
        self._synced_bytes = self._size_bytes

    def append(self, record: msgspec.Struct) -> None:
        """Add one line.

        Raises:
            JobError: the disk did not take it; the file is as it was before.
        """
        line = json_line(record)
        try:
            written = os.write(self._fd, line)
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError as e:
            os.ftruncate(self._fd, self._size_bytes)
            raise cannot_write(self.path, e) from e
        self._size_bytes += len(line)

    def sync(self) -> None:
        """Make every line that was added before this call survive a power cut."""
        size_bytes = self._size_bytes
        if size_bytes != self._synced_bytes:
            os.fsync(self._fd)
            self._synced_bytes = size_bytes

    def close(self) -> None:
        """Sync and close."""
        try:
            self.sync()
        finally:
            os.close(self._fd)


def cannot_write(path: Path, e: OSError) -> JobError:
    """The disk did not take what was to go to `path`, in words."""
    return JobError(
        f"cannot write {path}: {e.strerror or e}. The finished lines before this are kept; "
        f"run the same command again to go on"
    )
