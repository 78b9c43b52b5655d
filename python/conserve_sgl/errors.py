"""Every error this package raises on purpose.

ConserveError
├── InputError             a file of the user's is wrong: names file, line and key
├── IncompatibleError      SGLang's version or one of its flags does not go with conserve
│   └── HookError          a hook into SGLang did not take
├── ServerError            a server did not start, or stopped answering
├── SettingError           a server that runs cannot be given this setting
├── JobError               a job cannot start or go on
└── StorageError           the storage of batches cannot be used or written
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "ConserveError",
    "HookError",
    "IncompatibleError",
    "InputError",
    "JobError",
    "ServerError",
    "SettingError",
    "StorageError",
]


class ConserveError(Exception):
    """Base of all errors of this package; its text is ready to be shown to a person."""


class InputError(ConserveError):
    """A file given by the user cannot be used.

    Args:
        path: the file.
        reason: what is wrong, as one sentence without a full stop.
        line: 1-based line, or None when the whole file is meant.
        key: dotted key or field name, or None.
    """

    def __init__(
        self, path: Path | str, reason: str, *, line: int | None = None, key: str | None = None
    ) -> None:
        self.path = Path(path)
        self.reason = reason
        self.line = line
        self.key = key
        where = str(path) if line is None else f"{path}:{line}"
        super().__init__(f"{where}: {f'{key}: ' if key else ''}{reason}")


class IncompatibleError(ConserveError):
    """SGLang's version, or the flags it was started with, do not go with conserve."""


class HookError(IncompatibleError):
    """A hook into SGLang was registered but is not in place."""


class ServerError(ConserveError):
    """A server did not start, died, or stopped answering."""


class SettingError(ConserveError):
    """A setting is unknown, or has a value that a server cannot run with."""


class JobError(ConserveError):
    """A job cannot start or cannot go on."""


class StorageError(ConserveError):
    """The folder in which a server keeps its batches cannot be used or written."""
