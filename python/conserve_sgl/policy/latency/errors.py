"""How far predictions were off: what they are stretched by, and whether they lean to one side."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterable, Sequence

import msgspec

from conserve_sgl.policy.latency.work import StepKind

__all__ = ["ErrorQuantiles", "Errors"]

_ERRORS_KEPT = 256
_UPPER = 0.90
_LARGEST_MARGIN = 0.3
_HEALING = 0.05
"""Of the margin of a kind of step that did not run since the last fit, what it loses: outliers must
not starve what then never runs to prove them wrong."""
_BIAS_LIMIT = 0.10
_BIAS_STEPS = 128


class ErrorQuantiles(msgspec.Struct, frozen=True):
    """Of predictions made before the step was seen, as shares of the predicted time.

    Args:
        steps: how many recent steps they are of.
        bias: median of (measured - predicted) / predicted; above 0, steps are slower than said.
        median: of its absolute value.
        p95: of its absolute value.
        upper: its 90th percentile, signed: what `upper_s` adds.
    """

    steps: int = 0
    bias: float = 0.0
    median: float = 0.0
    p95: float = 0.0
    upper: float = 0.0

    @classmethod
    def of(cls, errors: Iterable[float]) -> ErrorQuantiles:
        """Of signed relative errors."""
        signed = sorted(errors)
        if not signed:
            return cls()
        absolute = sorted(map(abs, signed))
        return cls(
            steps=len(signed),
            bias=_quantile(signed, 0.5),
            median=_quantile(absolute, 0.5),
            p95=_quantile(absolute, 0.95),
            upper=_quantile(signed, _UPPER),
        )


class Errors:
    """The errors of recent predictions, signed, as shares of the predicted time.

    `bias` is the median of the last observed ones, whatever their kind, and `uppers` what the mean
    is multiplied by to stay above nine of ten steps, by kind; both are of the last `refit`.

    Args:
        first: errors before any step was observed, with the kinds of the steps.
    """

    def __init__(self, first: Iterable[tuple[StepKind, float]]) -> None:
        self._errors = {kind: deque[float](maxlen=_ERRORS_KEPT) for kind in StepKind}
        for kind, error in first:
            self._errors[kind].append(error)
        self._signed = deque[float](maxlen=_BIAS_STEPS)
        self._trust = dict.fromkeys(StepKind, 1.0)
        self.refit(StepKind)

    def observe(self, kind: StepKind, error: float) -> None:
        """A step that was predicted was off by so much."""
        self._errors[kind].append(error)
        self._signed.append(error)

    def refit(self, ran: Container[StepKind]) -> None:
        """The costs were fitted again, and steps of these kinds had run since the last time."""
        for kind in StepKind:
            self._trust[kind] = 1.0 if kind in ran else self._trust[kind] * (1 - _HEALING)
        self.uppers = tuple(1 + self._margin(kind) for kind in StepKind)
        self.bias = _quantile(sorted(self._signed), 0.5)

    def _margin(self, kind: StepKind) -> float:
        above = _quantile(sorted(self._errors[kind]), _UPPER)
        return min(max(above, 0.0), _LARGEST_MARGIN) * self._trust[kind]

    def quantiles(self, kind: StepKind | None = None) -> ErrorQuantiles:
        """Of one kind of steps, or of all."""
        kinds = StepKind if kind is None else (kind,)
        return ErrorQuantiles.of(e for k in kinds for e in self._errors[k])

    @property
    def is_biased(self) -> bool:
        """Whether steps are off to one side by more than a tenth, though the fit follows them."""
        return len(self._signed) == _BIAS_STEPS and abs(self.bias) > _BIAS_LIMIT


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest of `ordered` that at least `share` of them do not exceed; 0 of none."""
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else 0.0
