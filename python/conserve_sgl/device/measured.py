"""From measured steps to a device: its costs, the table of medians, and the noise around it.

A measured time is the longer of the device's and of the host's that launches the step. Where it may
be the host's, the table holds what the costs say, which are fitted to steps that are the device's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from statistics import median, median_low

import msgspec
import numpy as np

from conserve_sgl.device.table import Costs, Device, StepTimes, place
from conserve_sgl.policy.latency import StepKind, StepSample, StepWork

__all__ = ["launch_times", "with_steps"]

_CELLS_PER_DOUBLING = 8
_QUANTILES = 41
_RANGE = 0.02, 0.98
"""Of the scatter what lies outside is as much the interpolation's as the machine's."""

_FEWEST = 20
"""Steps of a kind below which their scatter says nothing of the noise."""

_LONGEST = 3.0
"""Times its table's time that a step counts as noise of; more is a pause of the machine."""

_AROUND, _PAUSE = 6, 1.35
"""A step that took so many times as long as the nearest so many, by its costs, is left out."""

_SMALL_PREFILL_TOKENS, _FEW_ROWS = 256, 8
_LARGE_PREFILL_TOKENS = 1024
_LEAST = 0.05
"""The quantile of the decode steps that is as short as one gets; the least may be a slip."""

_HOST_BOUND = 1.25
"""Times the launch up to which a step may have been the host's."""


def with_steps(device: Device, samples: Iterable[StepSample]) -> Device:
    """`device` with costs, table and noise of `samples`, instead of its own."""
    cells = list(_cells(samples).values())
    table = [_middle(cell) for cell in cells]
    own = [_HOST_BOUND * device.launch_s[s.work.kind] < s.seconds for s in table]
    costs = _fitted(device.costs, list(itertools.compress(table, own)))
    steps = [
        s if is_own else StepSample(s.work, _rounded(min(s.seconds, costs.seconds(s.work))))
        for s, is_own in zip(table, own, strict=True)
    ]
    steps = tuple(_without_pauses(costs, steps))
    device = msgspec.structs.replace(device, costs=costs, steps=steps)
    return msgspec.structs.replace(
        device, noise=_noise(StepTimes(device), itertools.compress(cells, own))
    )


def launch_times(samples: Sequence[StepSample], decode_s: float) -> tuple[float, float, float]:
    """What launching a step takes the host, of each kind: the median of steps with a prompt that is
    too short for the device to be the slower of the two.

    Args:
        samples: measured steps.
        decode_s: of a decode step, which no measured step tells: it is always the device's.
    """

    def small(kind: StepKind) -> float:
        times = [s.seconds for s in samples if s.work.kind is kind and _is_small(s.work)]
        return median(times) if times else 0.0

    prefill_s = small(StepKind.PREFILL)
    return prefill_s, decode_s, min(small(StepKind.MIXED) or prefill_s, 2 * prefill_s)


def _is_small(work: StepWork) -> bool:
    return work.prefill_tokens <= _SMALL_PREFILL_TOKENS and work.decode_rows <= _FEW_ROWS


# --------------------------------------------------------------------------- the table


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
    """The median time, of two the shorter: a pause makes a step longer, nothing makes it shorter.
    Of the work the mean, so that a cell lies where its steps do."""
    first = cell[0].work
    work = StepWork(
        prefill_tokens=round(np.mean([s.work.prefill_tokens for s in cell])),
        prefill_attention=float(np.mean([s.work.prefill_attention for s in cell])),
        decode_rows=first.decode_rows,
        decode_context=round(np.mean([s.work.decode_context for s in cell])),
        prompts=first.prompts,
    )
    return StepSample(work, _rounded(median_low(s.seconds for s in cell)))


def _without_pauses(costs: Costs, table: Sequence[StepSample]) -> Iterable[StepSample]:
    """Without steps that took far longer than those around them: a shape's first run, say."""
    ratios = np.array([s.seconds / costs.seconds(s.work) for s in table])
    places = np.array([place(s.work) for s in table])
    kinds = np.array([s.work.kind for s in table])
    for i, sample in enumerate(table):
        others = np.flatnonzero(kinds == kinds[i])
        far = np.square(places[others] - places[i]).sum(axis=1)
        around = others[np.argsort(far)[1 : _AROUND + 1]]
        if not len(around) or ratios[i] <= _PAUSE * np.median(ratios[around]):
            yield sample


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.6g}")


def _fitted(rough: Costs, steps: Sequence[StepSample]) -> Costs:
    """Costs of `steps`, kind by kind; of a kind that is not there, those of `rough`."""
    of_kind = {kind: [s for s in steps if s.work.kind is kind] for kind in StepKind}
    costs = rough
    if decodes := of_kind[StepKind.DECODE]:
        least_s = float(np.quantile([s.seconds for s in decodes], _LEAST))
        rest = [s.seconds - least_s for s in decodes]
        parts = [(s.work.decode_rows, s.work.decode_context) for s in decodes]
        row_s, context_s = _solved(decodes, rest, parts)
        costs = msgspec.structs.replace(costs, least_s=least_s, row_s=row_s, context_s=context_s)
    if prefills := of_kind[StepKind.PREFILL]:
        large = [s for s in prefills if s.work.prefill_tokens >= _LARGE_PREFILL_TOKENS] or prefills
        parts = [(s.work.prefill_tokens, s.work.prefill_attention) for s in large]
        token_s, pair_s = _solved(large, [s.seconds for s in large], parts)
        costs = msgspec.structs.replace(costs, token_s=token_s or rough.token_s, pair_s=pair_s)
    if mixed := of_kind[StepKind.MIXED]:
        alike = msgspec.structs.replace(costs, mixed_row_s=0.0)
        rest = [s.seconds - alike.seconds(s.work) for s in mixed]
        (row_s,) = _solved(mixed, rest, [(s.work.decode_rows,) for s in mixed])
        costs = msgspec.structs.replace(costs, mixed_row_s=row_s)
    return costs


def _solved(
    steps: Sequence[StepSample], seconds: Sequence[float], parts: Sequence[tuple[float, ...]]
) -> list[float]:
    """Costs of the `parts`, none negative, that make up the `seconds` of each of `steps`; errors
    count relatively to the whole step."""
    from scipy.optimize import nnls

    weights = np.array([1 / s.seconds for s in steps])
    rows = np.array(parts, dtype=float)
    scale = np.maximum(rows.max(axis=0), 1e-12)  # a step's features differ by six magnitudes
    costs, _ = nnls(rows / scale * weights[:, None], np.maximum(seconds, 0.0) * weights)
    return (costs / scale).tolist()


# --------------------------------------------------------------------------- the noise


def _noise(
    times: StepTimes, cells: Iterable[Sequence[StepSample]]
) -> tuple[tuple[float, ...], ...]:
    """Of each kind: measured over interpolated times, around 1 in the median."""
    factors: dict[StepKind, list[float]] = {kind: [] for kind in StepKind}
    for cell in cells:
        for sample in cell:
            factors[sample.work.kind].append(sample.seconds / times.measure_s(sample.work))
    return tuple(_quantiles(factors[kind]) for kind in StepKind)


def _quantiles(factors: Sequence[float]) -> tuple[float, ...]:
    if len(factors) < _FEWEST:
        return ()
    values = np.array(factors) / np.median(factors)
    values = values[(values > 1 / _LONGEST) & (values < _LONGEST)]
    values = np.quantile(values, np.linspace(*_RANGE, _QUANTILES))
    return tuple(float(f"{value:.4g}") for value in values)
