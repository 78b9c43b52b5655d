"""Offline work without end: bodies for SGLang's `/generate`, made as they are needed.

A source is a few lines of YAML, told apart by `kind`. The same seed gives the same bodies in the
same order; how far a system gets through them is what is measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from conserve_sgl.bench.load.arrivals import Count, Lengths, Natural
from conserve_sgl.bench.load.prompts import TokenIds, generate_body
from conserve_sgl.errors import InputError

__all__ = ["STREAM_INTERVAL", "Backlog", "JsonlPrompts", "PromptShape", "RandomPrompts"]

STREAM_INTERVAL = 16
"""Tokens of an answer that come at a time: the client shares its cores with the engine."""


class PromptShape(msgspec.Struct, frozen=True):
    """How long a request is: prompt tokens of its own, after the prefix of its group."""

    prompt_tokens: int
    output_tokens: int
    group: int


class RandomPrompts(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="random", tag_field="kind"
):
    """Random token ids of drawn lengths; answers run to their drawn length (`ignore_eos`).

    With `prefix_groups` groups, each prompt begins with the `prefix_tokens` tokens that its group
    shares, as few-shot evaluations do; they come on top of the drawn length.
    """

    prompt: Lengths
    output: Lengths
    prefix_tokens: Natural = 0
    prefix_groups: Count = 1
    token_ids: TokenIds = TokenIds()

    def bodies(self, seed: Sequence[int], extra: Mapping[str, Any]) -> Iterator[bytes]:
        """Requests without end; `extra` fields go into every one."""
        for shape, ids in self._draws(seed):
            yield generate_body(
                {"input_ids": ids}, shape.output_tokens, extra, stream_interval=STREAM_INTERVAL
            )

    def shapes(self, seed: Sequence[int]) -> Iterator[PromptShape]:
        """What `bodies(seed)` asks for, without the bodies."""
        return (shape for shape, _ in self._draws(seed))

    def _draws(self, seed: Sequence[int]) -> Iterator[tuple[PromptShape, list[int]]]:
        rng = np.random.default_rng(seed)
        low, high = self.token_ids.low, self.token_ids.high
        prefixes = [
            rng.integers(low, high, self.prefix_tokens).tolist() for _ in range(self.prefix_groups)
        ]
        while True:
            (prompt,), (output,) = self.prompt.sample(rng, 1), self.output.sample(rng, 1)
            group = int(rng.integers(len(prefixes)))
            ids = prefixes[group] + rng.integers(low, high, prompt).tolist()
            yield PromptShape(int(prompt), int(output), group), ids


class JsonlPrompts(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="jsonl", tag_field="kind"
):
    """Prompts from a file of JSON objects, over and over, in the file's order.

    With `shots`, every prompt begins with the first so many lines, each followed by its
    `answer_field`; those lines are not asked.
    """

    path: str
    field: str
    max_tokens: Count
    answer_field: str | None = None
    shots: Natural = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.shots and self.answer_field is None:
            raise ValueError("shots need answer_field")

    def bodies(self, seed: Sequence[int], extra: Mapping[str, Any]) -> Iterator[bytes]:  # noqa: ARG002
        """Requests without end; `extra` fields go into every one.

        Raises:
            InputError: an unreadable file, a line that is no object or lacks a field, or nothing
                left to ask.
        """
        rows = list(self._rows())
        if len(rows) <= self.shots:
            raise InputError(self.path, f"has no line beyond its {self.shots} shots")
        shots = "".join(
            f"{self._text(line, row, self.field)}\n{self._text(line, row, self.answer_field)}\n\n"
            for line, row in rows[: self.shots]
        )
        prompts = [f"{shots}{self._text(line, row, self.field)}\n" for line, row in rows]
        return (
            generate_body(
                {"text": prompt},
                self.max_tokens,
                extra,
                ignore_eos=self.ignore_eos,
                stream_interval=STREAM_INTERVAL,
            )
            for prompt in itertools.cycle(prompts[self.shots :])
        )

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        decoder = msgspec.json.Decoder(dict[str, Any])
        try:
            lines = Path(self.path).read_bytes().splitlines()
        except OSError as e:
            raise InputError(self.path, f"cannot be read: {e.strerror}") from e
        for number, line in enumerate(lines, start=1):
            try:
                yield number, decoder.decode(line)
            except msgspec.DecodeError as e:
                raise InputError(self.path, f"not a JSON object: {e}", line=number) from e

    def _text(self, line: int, row: Mapping[str, Any], field: str | None) -> str:
        value = row.get(field)
        if not isinstance(value, str):
            raise InputError(self.path, "is missing or no text", line=line, key=field)
        return value


Backlog = RandomPrompts | JsonlPrompts
