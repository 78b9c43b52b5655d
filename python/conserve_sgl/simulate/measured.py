"""From measured steps to a device: the table of medians, and the noise around it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

import msgspec
import numpy as np

from conserve_sgl.policy.latency import StepKind, StepSample, StepWork
from conserve_sgl.simulate.device import Device, StepTimes

__all__ = ["with_steps"]

_CELLS_PER_DOUBLING = 8
_QUANTILES = 41
_FEWEST = 20
"""Steps of a kind below which their scatter says nothing of the noise."""

_LONGEST = 3.0
"""Times its table's time that a step counts as noise of; more is a pause of the machine."""


def with_steps(device: Device, samples: Iterable[StepSample]) -> Device:
    """`device` with the table and the noise of `samples`, instead of its own."""
    cells = list(_cells(samples).values())
    device = msgspec.structs.replace(device, steps=tuple(map(_middle, cells)))
    return msgspec.structs.replace(device, noise=_noise(StepTimes(device), cells))


def _cells(samples: Iterable[StepSample]) -> dict[tuple[int, ...], list[StepSample]]:
    """Steps of one shape, or nearly, together."""
    cells: dict[tuple[int, ...], list[StepSample]] = {}
    for sample in samples:
        cells.setdefault(_cell(sample.work), []).append(sample)
    return cells


def _cell(work: StepWork) -> tuple[int, ...]:
    seen = work.prefill_attention / work.prefill_tokens if work.prefill_tokens else 0.0
    context = work.decode_context / work.decode_rows if work.decode_rows else 0.0
    sizes = (work.prefill_tokens, 64 + seen, 128 + context)
    places = np.rint(_CELLS_PER_DOUBLING * np.log2(np.maximum(sizes, 1)))
    return (*places.astype(int).tolist(), work.prompts, work.decode_rows)


def _middle(cell: Sequence[StepSample]) -> StepSample:
    """The median time; of the work the mean, so that a cell lies where its steps do."""
    first = cell[0].work
    work = StepWork(
        prefill_tokens=round(np.mean([s.work.prefill_tokens for s in cell])),
        prefill_attention=float(np.mean([s.work.prefill_attention for s in cell])),
        decode_rows=first.decode_rows,
        decode_context=round(np.mean([s.work.decode_context for s in cell])),
        prompts=first.prompts,
    )
    return StepSample(work, float(f"{median(s.seconds for s in cell):.6g}"))


def _noise(
    times: StepTimes, cells: Iterable[Sequence[StepSample]]
) -> tuple[tuple[float, ...], ...]:
    """Of each kind: measured over interpolated times, around 1 in the median."""
    factors: dict[StepKind, list[float]] = {kind: [] for kind in StepKind}
    for cell in cells:
        for sample in cell:
            factor = sample.seconds / times.mean_s(sample.work)
            factors[sample.work.kind].append(factor)
    return tuple(_quantiles(factors[kind]) for kind in StepKind)


def _quantiles(factors: Sequence[float]) -> tuple[float, ...]:
    if len(factors) < _FEWEST:
        return ()
    values = np.array(factors) / np.median(factors)
    values = np.quantile(values[values < _LONGEST], np.linspace(0, 1, _QUANTILES))
    return tuple(float(f"{value:.4g}") for value in values)
