"""Steps that an engine served, written down, and how well a model would have predicted them.

`CONSERVE_STEP_LOG=FILE` makes a scheduler append every step; `conserve profile --check FILE` reads
them. The steps are those of real requests, in their order, so both ways of predicting them can be
told apart: by the profile alone, and by the model that learns as it goes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO, Self

import msgspec

from conserve_sgl.errors import InputError
from conserve_sgl.policy.latency import ErrorQuantiles, LatencyModel, StepKind, StepSample

__all__ = ["GRID_ENV", "STEP_LOG_ENV", "HeldOut", "StepLog", "held_out", "read_steps"]

STEP_LOG_ENV = "CONSERVE_STEP_LOG"
"""Environment variable with the file that a scheduler appends its steps to."""

GRID_ENV = "CONSERVE_PROFILE_GRID"
"""Environment variable with the file that a scheduler appends a dense grid of steps to, measured
at its start."""


class StepLog:
    """Appends steps to a file as JSON lines, or, without a file, does nothing."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        self._file = file
        self._encoder = msgspec.json.Encoder()

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """The file that `CONSERVE_STEP_LOG` names, if it does.

        Raises:
            InputError: it cannot be written.
        """
        path = environment.get(STEP_LOG_ENV)
        return cls.to(path) if path else cls()

    @classmethod
    def to(cls, path: str) -> Self:
        """The file at `path`, made if there is none.

        Raises:
            InputError: it cannot be written.
        """
        try:
            return cls(open(path, "ab", buffering=0))
        except OSError as e:
            raise InputError(path, f"cannot be written: {e.strerror or e}") from e

    def write(self, sample: StepSample) -> None:
        """Append one step."""
        if self._file is not None:
            self._file.write(self._encoder.encode(sample) + b"\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_steps(path: Path) -> list[StepSample]:
    """The steps of a log; a last line that was cut off is left out.

    Raises:
        InputError: it cannot be read, a line is not a step (with its number), or there are none.
    """
    try:
        text = path.read_bytes()
    except OSError as e:
        raise InputError(path, f"cannot be read: {e.strerror or e}") from e
    decoder = msgspec.json.Decoder(StepSample)
    samples: list[StepSample] = []
    *lines, _cut_off = text.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            samples.append(decoder.decode(line))
        except ValueError as e:
            raise InputError(path, f"not a step: {e}", line=number) from e
    if not samples:
        raise InputError(path, "there is no step in it")
    return samples


class HeldOut(msgspec.Struct, frozen=True):
    """How steps were predicted before they were seen.

    Args:
        errors: by kind of step; kinds that did not occur are left out.
        all: of all steps.
        under_upper: share of the steps that took no longer than `upper_s` said.
    """

    errors: dict[StepKind, ErrorQuantiles]
    all: ErrorQuantiles
    under_upper: float


def held_out(model: LatencyModel, samples: Iterable[StepSample], *, learn: bool) -> HeldOut:
    """Predict each of `samples` in turn; with `learn`, `model` then observes it."""
    errors: dict[StepKind, list[float]] = {kind: [] for kind in StepKind}
    under = []
    for sample in samples:
        errors[sample.work.kind].append(
            sample.seconds / max(model.predict_s(sample.work), 1e-9) - 1
        )
        under.append(sample.seconds <= model.upper_s(sample.work))
        if learn:
            model.observe(sample.work, sample.seconds)
    return HeldOut(
        errors={kind: ErrorQuantiles.of(some) for kind, some in errors.items() if some},
        all=ErrorQuantiles.of(error for some in errors.values() for error in some),
        under_upper=sum(under) / len(under),
    )
