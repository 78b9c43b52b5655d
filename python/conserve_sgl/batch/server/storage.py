"""The folder of a server's batches.

<storage_dir>/batch.db    what exists: files and batches (`database.py`, `store.py`)
<storage_dir>/files/ID    the content of each file; of an active batch also its results so far
<storage_dir>/uploads/    files on their way in
<storage_dir>/.lock       held by the one process that uses the folder
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from conserve_sgl.errors import StorageError

__all__ = ["Storage", "make_storage"]

_FILES, _UPLOADS = "files", "uploads"


class Storage:
    """The folder, taken for this process until `release`.

    Raises:
        StorageError: it cannot be made or written, or another process has it.
    """

    def __init__(self, folder: Path) -> None:
        make_storage(folder)
        self.folder = folder
        self.files = folder / _FILES
        self.uploads = folder / _UPLOADS
        self.database = folder / "batch.db"
        self._lock = _open_lock(folder)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            os.close(self._lock)
            raise StorageError(f"another server is using {folder} for its batches") from e

    def release(self) -> None:
        """Let another process have it."""
        os.close(self._lock)


def make_storage(folder: Path) -> None:
    """Make the folder if it is not there.

    Raises:
        StorageError: it cannot be made or written.
    """
    try:
        for path in (folder, folder / _FILES, folder / _UPLOADS):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise StorageError(f"cannot use {folder} for batches: {e.strerror or e}") from e
    os.close(_open_lock(folder))


def _open_lock(folder: Path) -> int:
    try:
        return os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as e:
        raise StorageError(f"cannot use {folder} for batches: {e.strerror or e}") from e
