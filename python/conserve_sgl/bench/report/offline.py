"""How much offline work was done: by a job, from the results that it streamed to disk, and by
the benchmark's own backlog, from the chunks that its client saw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.errors import InputError

__all__ = [
    "OfflineRecord",
    "OfflineSummary",
    "TokenRates",
    "job_rates",
    "rates",
    "read_results",
    "spread",
    "summarize_backlog",
    "summarize_offline",
    "token_rates",
]


class OfflineRecord(msgspec.Struct, frozen=True):
    """One finished line of a job's results, as far as throughput is concerned.

    `done_unix_s` is Unix time; `cached_tokens` is None when the server did not say.
    """

    done_unix_s: float
    latency_s: float
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None

    @property
    def started_unix_s(self) -> float:
        return self.done_unix_s - self.latency_s

    @property
    def prefix_tokens(self) -> int:
        """Prompt tokens served from the cache."""
        return self.cached_tokens or 0

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were not served from the cache."""
        return self.prompt_tokens - self.prefix_tokens


class OfflineSummary(msgspec.Struct, frozen=True):
    """Offline work inside a window of `duration_s` seconds, in tokens."""

    duration_s: float
    completed: int
    input_tokens: float
    cached_tokens: float
    output_tokens: float

    @property
    def input_tokens_per_s(self) -> float:
        """Prompt tokens computed a second, without those from the cache."""
        return self.input_tokens / self.duration_s

    @property
    def cached_tokens_per_s(self) -> float:
        """Prompt tokens served from the cache a second."""
        return self.cached_tokens / self.duration_s

    @property
    def output_tokens_per_s(self) -> float:
        return self.output_tokens / self.duration_s

    @property
    def total_tokens_per_s(self) -> float:
        return self.input_tokens_per_s + self.output_tokens_per_s


def read_results(folder: Path) -> tuple[OfflineRecord, ...]:
    """The finished lines of every task of the job whose output folder this is.

    Raises:
        InputError: a line that is no result, with its file and number.
    """
    files = [path for path in sorted(folder.glob("*.jsonl")) if ".errors" not in path.suffixes]
    return tuple(record for path in files for record in _records(path))


_RECORD = msgspec.json.Decoder(OfflineRecord)


def _records(path: Path) -> Iterator[OfflineRecord]:
    # What follows the last newline is a line that a kill cut short.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            yield _RECORD.decode(line)
        except msgspec.DecodeError as e:
            raise InputError(path, f"not a result: {e}", line=number) from e


def summarize_offline(
    records: Sequence[OfflineRecord], start_unix_s: float, end_unix_s: float
) -> OfflineSummary:
    """The work of `records` that falls between two Unix times; see `rates`."""
    duration_s = end_unix_s - start_unix_s
    edges = [start_unix_s, end_unix_s]
    return OfflineSummary(
        duration_s=duration_s,
        completed=sum(start_unix_s <= r.done_unix_s < end_unix_s for r in records),
        input_tokens=duration_s * float(rates(edges, records, "computed_tokens")[0]),
        cached_tokens=duration_s * float(rates(edges, records, "prefix_tokens")[0]),
        output_tokens=duration_s * float(rates(edges, records, "completion_tokens")[0]),
    )


def rates(
    edges_unix_s: Sequence[float], records: Sequence[OfflineRecord], field: str
) -> np.ndarray:
    """Tokens a second in each interval between the edges, shape (len(edges) - 1,).

    A result says when a request began and ended, not when each token came: its tokens are spread
    evenly over its life. Requests that never finished are not counted.
    """
    starts = [record.started_unix_s for record in records]
    ends = [record.done_unix_s for record in records]
    return spread(edges_unix_s, starts, ends, [getattr(record, field) for record in records])


class TokenRates(msgspec.Struct, frozen=True):
    """Tokens a second in each interval between some edges, each of shape (len(edges) - 1,).

    `computed` are prompt tokens that were not served from the cache, `cached` those that were.
    """

    computed: np.ndarray
    cached: np.ndarray
    output: np.ndarray


def token_rates(edges_s: Sequence[float], records: Sequence[RequestRecord]) -> TokenRates:
    """What was got of `records`, finished or not, by the times that the client saw.

    A prompt's tokens are spread evenly from sending to the first chunk, those of a later chunk
    over the time since the chunk before. A prompt whose first chunk never came counts nothing.
    """
    begun = [record for record in records if record.chunk_times_s]
    sent = [record.sent_s for record in begun]
    first = [record.chunk_times_s[0] for record in begun]
    cached = [record.cached_tokens for record in begun]
    computed = [record.prompt_tokens - record.cached_tokens for record in begun]
    times = [time_s for record in begun for time_s in record.chunk_times_s]
    before = [
        time_s
        for record in begun
        for time_s in (record.chunk_times_s[0], *record.chunk_times_s[:-1])
    ]
    tokens = [count for record in begun for count in record.chunk_tokens]
    return TokenRates(
        computed=spread(edges_s, sent, first, computed),
        cached=spread(edges_s, sent, first, cached),
        output=spread(edges_s, before, times, tokens),
    )


def job_rates(
    edges_s: Sequence[float], records: Sequence[OfflineRecord], started_unix_s: float
) -> TokenRates:
    """What a job got done, by `rates`; edges are seconds after the stream began."""
    edges_unix_s = [started_unix_s + edge_s for edge_s in edges_s]
    return TokenRates(
        computed=rates(edges_unix_s, records, "computed_tokens"),
        cached=rates(edges_unix_s, records, "prefix_tokens"),
        output=rates(edges_unix_s, records, "completion_tokens"),
    )


def summarize_backlog(records: Sequence[RequestRecord], duration_s: float) -> OfflineSummary:
    """The work of `records` in the `duration_s` seconds from the beginning of the stream."""
    got = token_rates([0.0, duration_s], records)
    return OfflineSummary(
        duration_s=duration_s,
        completed=sum(r.completed and 0 <= r.done_s < duration_s for r in records),
        input_tokens=duration_s * float(got.computed[0]),
        cached_tokens=duration_s * float(got.cached[0]),
        output_tokens=duration_s * float(got.output[0]),
    )


def spread(
    edges: Sequence[float],
    starts: Sequence[float],
    ends: Sequence[float],
    amounts: Sequence[float],
) -> np.ndarray:
    """Amount a unit of time in each interval between `edges`, shape (len(edges) - 1,).

    `amounts[i]` is spread evenly from `starts[i]` to `ends[i]`.
    """
    widths = np.diff(edges)
    begin = np.reshape(starts, (-1, 1)).astype(float)
    life = np.maximum(np.reshape(ends, (-1, 1)) - begin, 1e-9)
    share = np.clip((np.asarray(edges) - begin) / life, 0.0, 1.0)
    return np.asarray(amounts, dtype=float) @ np.diff(share, axis=1) / widths
