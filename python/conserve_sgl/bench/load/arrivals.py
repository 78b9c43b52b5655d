"""When online requests arrive and how long they are: seeded distributions and real traces.

A source is a few lines of YAML, told apart by `kind`. `source.draw(duration_s, seed)` is pure but
for reading the trace file: same source, duration and seed, same arrivals.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, TextIO

import msgspec
import numpy as np

from conserve_sgl.errors import InputError

__all__ = ["Arrival", "AzureTrace", "Gamma", "Lengths", "MooncakeTrace", "OnOff", "Source"]


Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]


class Arrival(msgspec.Struct, frozen=True):
    """One request of a stream, `at_s` seconds after the stream began.

    `blocks` names, from the prompt's beginning, blocks of `block_tokens` tokens each: prompts that
    begin with the same names begin with the same tokens. A prompt ends within its last block, or
    goes on after it with tokens of its own.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    block_tokens: int = 0


class Lengths(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Log-normal token counts, cut at both ends.

    `sigma` is the standard deviation of the logarithm: 0 gives `median_tokens` every time.
    """

    median_tokens: Count
    max_tokens: Count
    min_tokens: Count = 1
    sigma: NotNegative = 0.0

    def __post_init__(self) -> None:
        if not self.min_tokens <= self.median_tokens <= self.max_tokens:
            raise ValueError("median_tokens is not between min_tokens and max_tokens")

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """`n` token counts, int64."""
        drawn = self.median_tokens * np.exp(self.sigma * rng.standard_normal(n))
        return np.clip(np.rint(drawn), self.min_tokens, self.max_tokens).astype(np.int64)


class Gamma(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="gamma", tag_field="kind"):
    """Gaps of a gamma distribution; a coefficient of variation of 1 is a Poisson process."""

    rate_per_s: Positive
    prompt: Lengths
    output: Lengths
    cv: Positive = 1.0

    def draw(self, duration_s: float, seed: int) -> tuple[Arrival, ...]:
        """The arrivals of the first `duration_s` seconds."""
        clock, lengths = _generators(seed)
        shape = self.cv**-2
        gaps = _gamma_gaps(clock, shape, 1 / (self.rate_per_s * shape))
        return _with_lengths(_until(duration_s, gaps), self.prompt, self.output, lengths)


class OnOff(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="on_off", tag_field="kind"
):
    """Bursts: Poisson arrivals at two rates, in quiet and busy periods of exponential lengths.

    A stream begins quiet.
    """

    rate_on_per_s: Positive
    rate_off_per_s: NotNegative
    mean_on_s: Positive
    mean_off_s: Positive
    prompt: Lengths
    output: Lengths

    def draw(self, duration_s: float, seed: int) -> tuple[Arrival, ...]:
        """The arrivals of the first `duration_s` seconds."""
        clock, lengths = _generators(seed)
        return _with_lengths(self._times(duration_s, clock), self.prompt, self.output, lengths)

    def _times(self, duration_s: float, rng: np.random.Generator) -> list[float]:
        times: list[float] = []
        start_s, busy = 0.0, False
        while start_s < duration_s:
            length_s = rng.exponential(self.mean_on_s if busy else self.mean_off_s)
            rate = self.rate_on_per_s if busy else self.rate_off_per_s
            count = rng.poisson(rate * length_s)
            times += (start_s + np.sort(rng.uniform(0, length_s, count))).tolist()
            start_s, busy = start_s + length_s, not busy
        return [t for t in times if t < duration_s]


class _Trace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every recorded trace can be bent by.

    `offset_s` is in the trace's own time; `stretch` 2 replays at half the speed. Lengths are
    divided by `length_divisor`, rounded, then cut to the given bounds.
    """

    path: str
    offset_s: NotNegative = 0.0
    stretch: Positive = 1.0
    length_divisor: Positive = 1.0
    min_tokens: Count = 1
    max_prompt_tokens: Count
    max_output_tokens: Count

    def __post_init__(self) -> None:
        if self.min_tokens > min(self.max_prompt_tokens, self.max_output_tokens):
            raise ValueError("min_tokens is above max_prompt_tokens or max_output_tokens")

    def _window(self, rows: Iterator[Arrival], duration_s: float) -> tuple[Arrival, ...]:
        end_s = self.offset_s + duration_s / self.stretch
        kept = [self._bent(row) for row in rows if self.offset_s <= row.at_s < end_s]
        if not kept:
            raise InputError(self.path, f"no request from {self.offset_s} s to {end_s} s")
        return tuple(sorted(kept, key=lambda arrival: arrival.at_s))

    def _bent(self, row: Arrival) -> Arrival:
        def scaled(tokens: int, max_tokens: int) -> int:
            return max(self.min_tokens, min(max_tokens, round(tokens / self.length_divisor)))

        return Arrival(
            (row.at_s - self.offset_s) * self.stretch,
            scaled(row.prompt_tokens, self.max_prompt_tokens),
            scaled(row.output_tokens, self.max_output_tokens),
            row.blocks,
            max(1, round(row.block_tokens / self.length_divisor)) if row.blocks else 0,
        )


class AzureTrace(_Trace, frozen=True, forbid_unknown_fields=True, tag="azure", tag_field="kind"):
    """Azure's LLM inference traces: CSV of TIMESTAMP, ContextTokens, GeneratedTokens."""

    def draw(self, duration_s: float, seed: int = 0) -> tuple[Arrival, ...]:  # noqa: ARG002
        """The arrivals of `duration_s` seconds of replay, from `offset_s` on.

        Raises:
            InputError: an unreadable file, a bad row (with its line), or an empty window.
        """
        return self._window(_azure_rows(Path(self.path)), duration_s)


class MooncakeTrace(
    _Trace, frozen=True, forbid_unknown_fields=True, tag="mooncake", tag_field="kind"
):
    """Mooncake's traces: JSON lines of timestamp (ms), input_length, output_length, hash_ids.

    A hash id stands for a block of 512 prompt tokens with all that comes before it; blocks are
    divided by `length_divisor` as prompts are, so that the share of shared tokens stays.
    """

    def draw(self, duration_s: float, seed: int = 0) -> tuple[Arrival, ...]:  # noqa: ARG002
        """The arrivals of `duration_s` seconds of replay, from `offset_s` on.

        Raises:
            InputError: an unreadable file, a bad row (with its line), or an empty window.
        """
        return self._window(_mooncake_rows(Path(self.path)), duration_s)


Source = Gamma | OnOff | AzureTrace | MooncakeTrace


def _generators(seed: int) -> list[np.random.Generator]:
    """One for times, one for lengths: other lengths must not move the arrivals."""
    return np.random.default_rng(seed).spawn(2)


def _gamma_gaps(rng: np.random.Generator, shape: float, scale: float) -> Iterator[float]:
    while True:
        yield rng.gamma(shape, scale)


def _until(duration_s: float, gaps: Iterator[float]) -> list[float]:
    times, now_s = [], 0.0
    for gap_s in gaps:
        now_s += gap_s
        if now_s >= duration_s:
            break
        times.append(now_s)
    return times


def _with_lengths(
    times: list[float], prompt: Lengths, output: Lengths, rng: np.random.Generator
) -> tuple[Arrival, ...]:
    prompts, outputs = prompt.sample(rng, len(times)), output.sample(rng, len(times))
    return tuple(
        Arrival(at_s, p, o)
        for at_s, p, o in zip(times, prompts.tolist(), outputs.tolist(), strict=True)
    )


_AZURE_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


def _azure_rows(path: Path) -> Iterator[Arrival]:
    with _opened(path) as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != _AZURE_COLUMNS:
            raise InputError(path, f"the header is not {','.join(_AZURE_COLUMNS)}", line=1)
        first: datetime | None = None
        for row in reader:
            line = reader.line_num
            at = _timestamp(path, line, row["TIMESTAMP"])
            first = first or at
            yield Arrival(
                (at - first).total_seconds(),
                _tokens(path, line, "ContextTokens", row["ContextTokens"]),
                _tokens(path, line, "GeneratedTokens", row["GeneratedTokens"]),
            )


def _timestamp(path: Path, line: int, text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).replace(tzinfo=None)
    except ValueError as e:
        raise InputError(path, f"not a time: {text!r}", line=line, key="TIMESTAMP") from e


def _tokens(path: Path, line: int, key: str, text: str | None) -> int:
    if text is None or not text.isascii() or not text.isdigit():
        raise InputError(path, f"not a number of tokens: {text!r}", line=line, key=key)
    return int(text)


_MOONCAKE_BLOCK_TOKENS = 512


class _MooncakeRow(msgspec.Struct, frozen=True):
    timestamp: NotNegative
    input_length: Natural
    output_length: Natural
    hash_ids: tuple[Natural, ...] = ()


def _mooncake_rows(path: Path) -> Iterator[Arrival]:
    decoder = msgspec.json.Decoder(_MooncakeRow)
    with _opened(path) as file:
        for line, text in enumerate(file, start=1):
            try:
                row = decoder.decode(text)
            except msgspec.DecodeError as e:
                raise InputError(path, f"not a Mooncake request: {e}", line=line) from e
            yield Arrival(
                row.timestamp / 1000,
                row.input_length,
                row.output_length,
                row.hash_ids,
                _MOONCAKE_BLOCK_TOKENS,
            )


def _opened(path: Path) -> TextIO:
    try:
        return path.open(encoding="utf-8", errors="replace", newline="")
    except OSError as e:
        raise InputError(path, f"cannot be read: {e.strerror}") from e
