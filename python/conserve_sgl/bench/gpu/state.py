"""What became of each part, kept among the results, so that a later run goes on."""

from __future__ import annotations

from pathlib import Path

import msgspec

from conserve_sgl.bench.command import UNFINISHED

__all__ = ["State", "States"]


class State(msgspec.Struct, frozen=True):
    """One part's last run.

    Args:
        status: 0 if all of it is done, `UNFINISHED` if its time did not suffice for all; None when
            it was cut off.
        seconds: it took.
        at_s: seconds after the start of the run.
    """

    status: int | None
    seconds: float
    at_s: float

    @property
    def failed(self) -> bool:
        """Whether anything but time was missing."""
        return self.status not in (0, UNFINISHED, None)

    @property
    def text(self) -> str:
        """In a word or two."""
        if self.failed:
            return f"failed ({self.status})"
        return "done" if self.status == 0 else "out of time"


class States:
    """By part, in `path`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.by_part: dict[str, State] = {}
        if path.exists():
            self.by_part = msgspec.json.decode(path.read_bytes(), type=dict[str, State])

    def note(self, part: str, state: State) -> None:
        """Keep what became of `part`."""
        self.by_part[part] = state
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(msgspec.json.format(msgspec.json.encode(self.by_part), indent=1))

    def is_done(self, part: str) -> bool:
        """Whether nothing of `part` is missing."""
        return part in self.by_part and self.by_part[part].status == 0
