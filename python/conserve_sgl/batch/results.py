"""The output and the error file of one batch, which are also the record of what is done.

A line is appended as its request finishes, to the output file (status 200) or to the error file
(everything else), and a request is sent again if and only if its custom_id is in neither. There is
no second record of progress that could disagree with the first. A crash can tear the last line of
each file; it is cut off, and its request is sent again.

After a power cut what was not yet synced may be missing (its requests are sent again) or damaged
(the file is cut at the damaged line).
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from conserve_sgl.batch.answers import usage_of
from conserve_sgl.batch.schema import RequestCounts, ResultLine, Usage
from conserve_sgl.client.append_file import AppendFile

__all__ = ["Results", "finished_lines"]

logger = logging.getLogger(__name__)


_decode_line = msgspec.json.Decoder(ResultLine).decode


class Results:
    """The open files of one batch; makes them, or goes on with them.

    Args:
        output, errors: paths of the two files.
        total: requests of the batch.

    Raises (as every method):
        OSError or JobError: a file cannot be read or written; what was written before is kept.
    """

    def __init__(self, output: Path, errors: Path, total: int = 0) -> None:
        self.total = total
        self.done: set[str] = set()
        self.usage = Usage()
        self._counts = {True: 0, False: 0}
        self._files: dict[bool, AppendFile] = {}
        for succeeded, path in ((True, output), (False, errors)):
            path.touch(mode=0o600)
            self._recover(path, succeeded)
            self._files[succeeded] = AppendFile(path)

    @property
    def counts(self) -> RequestCounts:
        """How many lines there are in each file."""
        return RequestCounts(
            total=self.total, completed=self._counts[True], failed=self._counts[False]
        )

    def add(self, line: ResultLine) -> None:
        """Append a finished line. May be called from several threads, one at a time."""
        self._files[line.succeeded].append(line)
        self._note(line, line.succeeded)

    def sync(self) -> None:
        """Make every line added so far survive a power cut."""
        for file in self._files.values():
            file.sync()

    def close(self) -> None:
        """Sync and close."""
        for file in self._files.values():
            file.close()

    def _note(self, line: ResultLine, succeeded: bool) -> None:
        self.done.add(line.custom_id)
        self._counts[succeeded] += 1
        if line.response is not None:
            self.usage = self.usage.plus(usage_of(line.response.body))

    def _recover(self, path: Path, succeeded: bool) -> None:
        with path.open("r+b") as file:
            good_bytes = 0
            for raw in file:
                try:
                    line = _decode_line(raw)
                except (msgspec.MsgspecError, UnicodeDecodeError):
                    line = None
                # The same request in both files would be counted twice: the first one stands.
                if line is None or not raw.endswith(b"\n") or line.custom_id in self.done:
                    logger.warning("%s is damaged after byte %d: cut there", path, good_bytes)
                    break
                self._note(line, succeeded)
                good_bytes += len(raw)
            file.truncate(good_bytes)


def finished_lines(path: Path) -> int:
    """How many lines a result file has, without reading what they say; 0 where there is none.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    except FileNotFoundError:
        return 0
