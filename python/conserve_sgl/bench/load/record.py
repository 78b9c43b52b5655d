"""What the client saw of its requests."""

from __future__ import annotations

import msgspec

__all__ = ["UNFINISHED", "LoadResult", "RequestRecord"]

UNFINISHED = "did not finish in time"
"""The error of a request that was dropped at the end of a run: no fault of the server's."""


class RequestRecord(msgspec.Struct, frozen=True, rename={"class_": "class"}):
    """What the client saw of one request. Times are seconds after the stream began.

    `prompt_tokens` is 0 as long as the server has not said how many there are.

    `chunk_times_s[i]` is when the i-th chunk with new tokens came and `chunk_tokens[i]` how many
    it brought. `done_s` is when the last chunk came; None, with `error` set, for a request
    that failed, was aborted, or did not finish in time.
    """

    class_: str
    due_s: float
    sent_s: float
    done_s: float | None
    chunk_times_s: tuple[float, ...]
    chunk_tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    error: str | None

    @property
    def completed(self) -> bool:
        return self.error is None

    @property
    def completion_tokens(self) -> int:
        return sum(self.chunk_tokens)

    @property
    def lateness_s(self) -> float:
        """How late our own sender was."""
        return self.sent_s - self.due_s


class LoadResult(msgspec.Struct, frozen=True):
    """One replayed stream; `started_unix_s` ties its clock to other processes' records."""

    started_unix_s: float
    duration_s: float
    records: tuple[RequestRecord, ...]
