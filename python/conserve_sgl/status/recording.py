"""What servers did over a while, as a file: a look a line, with every step since the one before."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from conserve_sgl.client.append_file import AppendFile
from conserve_sgl.errors import InputError
from conserve_sgl.status.ask import Ask
from conserve_sgl.status.fetch import Seen
from conserve_sgl.status.record import Snapshot

__all__ = ["Recorder", "read_recording"]

_ALL = Ask(since=None, most=None)


class Recorder:
    """Appends to a recording, one that is there already included: its servers go on with the step
    that comes next. A last line that was cut off is taken away.

    Raises:
        InputError: the file cannot be read or written, or is no recording.
    """

    def __init__(self, path: Path) -> None:
        self._last: dict[str, Snapshot] = {}
        if path.exists():
            _drop_cut_line(path)
            for seen in read_recording(path, at_least_one=False):
                self._note(seen)
        try:
            self._file = AppendFile(path)
        except OSError as e:
            raise InputError(path, f"cannot be written: {e.strerror or e}") from e

    def which(self, endpoint: str) -> Ask:
        """The steps to ask the server for: those since its last line, or all that it keeps."""
        last = self._last.get(endpoint)
        return _ALL if last is None else Ask(since=last.next_step, most=None)

    def restarted(self, seen: Seen) -> bool:
        """Whether this is not the server of the last line: its steps count anew, and have to be
        asked for again."""
        last, now = self._last.get(seen.endpoint), seen.snapshot
        return None not in (last, now) and _identity(last) != _identity(now)

    def restart(self, endpoint: str) -> None:
        """Begin with this server anew."""
        del self._last[endpoint]

    def append(self, seen: Seen) -> Seen:
        """Add a look, and say how many steps were lost before its own.

        Raises:
            JobError: the disk did not take it.
        """
        last, now = self._last.get(seen.endpoint), seen.snapshot
        if last is not None and now is not None:
            first = now.steps[0].seq if now.steps else now.next_step
            seen = msgspec.structs.replace(seen, lost_steps=max(first - last.next_step, 0))
        self._file.append(seen)
        self._note(seen)
        return seen

    def close(self) -> None:
        """Sync and close the file."""
        self._file.close()

    def _note(self, seen: Seen) -> None:
        if seen.snapshot is not None:
            self._last[seen.endpoint] = msgspec.structs.replace(seen.snapshot, steps=())


def read_recording(path: Path, *, at_least_one: bool = True) -> Iterator[Seen]:
    """The looks of a recording, in order; a last line that was cut off is left out.

    Raises:
        InputError: it cannot be read, a line is no look (with its number), or there is none.
    """
    decoder, found = msgspec.json.Decoder(Seen), False
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    yield decoder.decode(line)
                except ValueError as e:
                    raise InputError(path, f"no line of a recording: {e}", line=number) from e
                found = True
    except OSError as e:
        raise InputError(path, f"cannot be read: {e.strerror or e}") from e
    if at_least_one and not found:
        raise InputError(path, "there is nothing in it")


def _identity(snapshot: Snapshot | None) -> tuple[str, int, float]:
    assert snapshot is not None
    server = snapshot.server
    return server.host, server.pid, server.started_at_s


def _drop_cut_line(path: Path) -> None:
    try:
        with path.open("rb+") as file:
            end = file.seek(0, 2)
            while end:
                begin = max(end - 65536, 0)
                file.seek(begin)
                at = file.read(end - begin).rfind(b"\n")
                if at >= 0:
                    file.truncate(begin + at + 1)
                    return
                end = begin
            file.truncate(0)
    except OSError as e:
        raise InputError(path, f"cannot be written: {e.strerror or e}") from e
