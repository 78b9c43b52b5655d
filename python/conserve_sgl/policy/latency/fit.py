"""The costs of a step, found by non-negative least squares.

That drops costs that do not help. Every residual is divided by the time measured (or predicted,
whichever is longer): a decode step of 5 ms counts as much as a prefill of 500 ms.

What is fitted is a profile (steps measured once, kept) together with the steps observed since,
which fade. Prefill, decode and mixed steps fade apart, so an hour of decoding does not forget what
a prompt costs; and the profile stays as the shape where nothing recent was seen, scaled to the
speed of now.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from conserve_sgl.policy.latency.costs import Coefficients, features
from conserve_sgl.policy.latency.work import StepKind, StepSample

__all__ = ["Fit", "cross_validated"]

_SIZE = len(msgspec.structs.fields(Coefficients))

_MEMORY_STEPS = 512
_PROFILE_WEIGHT = 32.0
"""Steps of a kind that the profile counts as; recent steps count up to `_MEMORY_STEPS`."""

_SPEED_STEPS = 128
"""Over how many steps of a kind the speed of now is averaged."""

_OUTLIER = 0.25
"""Relative error beyond which a step counts less (Huber): a pause of the machine is not its speed,
and yet a machine that became slower for good is followed."""


class Fit:
    """The costs that fit a profile, and the steps that were learnt from since.

    Args:
        samples: the profile, at least one step.

    Attributes:
        coefficients: the costs of now.
    """

    def __init__(self, samples: Sequence[StepSample]) -> None:
        self._recent = {kind: _Moments() for kind in StepKind}
        first = _fit(samples)
        self._profile = {k: _Moments.of_profile(samples, k, first) for k in StepKind}
        self._profile_costs = _solve(self._profile.values())
        self._speed = dict.fromkeys(StepKind, 1.0)
        self._use(self._profile_costs)

    def learn(self, steps: Sequence[StepSample]) -> set[StepKind]:
        """Fit the costs anew with `steps` in the account; returns the kinds that they are of."""
        ran = set()
        for kind in StepKind:
            if of_kind := [s for s in steps if s.work.kind is kind]:
                ran.add(kind)
                self._learn(kind, of_kind)
        scaled = [self._profile[kind].scaled(self._speed[kind]) for kind in StepKind]
        self._use(_solve([*scaled, *self._recent.values()]))
        return ran

    def _learn(self, kind: StepKind, steps: list[StepSample]) -> None:
        rows, seconds = _matrix(steps)
        by_profile = rows @ self._profile_costs
        if self._profile[kind].steps and by_profile.min() > 0:
            keep = (1 - 1 / _SPEED_STEPS) ** len(steps)
            speed = float(np.median(seconds / by_profile))
            self._speed[kind] = keep * self._speed[kind] + (1 - keep) * speed
        predicted = rows @ self._costs
        error = np.abs(seconds / np.maximum(predicted, 1e-9) - 1)
        trust = np.minimum(1.0, _OUTLIER / np.maximum(error, _OUTLIER))
        self._recent[kind].fade(len(steps))
        self._recent[kind].add(rows, seconds, np.maximum(seconds, predicted), trust)

    def _use(self, costs: np.ndarray) -> None:
        self._costs = costs
        self.coefficients = Coefficients(*costs.tolist())


def cross_validated(samples: Sequence[StepSample]) -> list[tuple[StepKind, float]]:
    """Relative errors of each half of the samples under costs fitted to the other half."""
    errors: list[tuple[StepKind, float]] = []
    for held_out in (0, 1):
        fitted = [s for i, s in enumerate(samples) if i % 2 != held_out] or samples
        costs = _fit(fitted, _fit(fitted))
        for sample in samples[held_out::2]:
            predicted_s = float(costs @ features(sample.work))
            if predicted_s > 0:
                errors.append((sample.work.kind, sample.seconds / predicted_s - 1))
    return errors


def _fit(samples: Sequence[StepSample], costs: np.ndarray | None = None) -> np.ndarray:
    """Costs [k] of a profile; `costs` of an earlier fit keep lucky short times from ruling it."""
    return _solve(_Moments.of_profile(samples, kind, costs) for kind in StepKind)


def _solve(parts: Iterable[_Moments]) -> np.ndarray:
    """Non-negative costs [k] that fit all `parts` best."""
    from scipy.optimize import nnls  # a quarter of a second that only processes that fit pay

    parts = list(parts)
    gram = sum(p.gram for p in parts)
    target = sum(p.target for p in parts)
    # Features differ by six orders of magnitude; nnls compares them.
    scale = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    unit = gram / np.outer(scale, scale)
    unit[np.diag_indices(_SIZE)] += 1e-9  # features that were never seen, or always together
    root = np.linalg.cholesky(unit).T
    costs, _ = nnls(root, np.linalg.solve(root.T, target / scale))
    return np.where(np.diag(gram) > 0, costs / scale, 0.0)


def _matrix(samples: Sequence[StepSample]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.array([features(s.work) for s in samples])
    return rows, np.array([s.seconds for s in samples])


class _Moments:
    """Normal equations of relatively weighted steps: what a fit needs of them."""

    def __init__(self) -> None:
        self.gram = np.zeros((_SIZE, _SIZE))
        self.target = np.zeros(_SIZE)
        self.steps = 0.0

    @classmethod
    def of_profile(
        cls, samples: Sequence[StepSample], kind: StepKind, costs: np.ndarray | None = None
    ) -> _Moments:
        """Of the profile's steps of one kind, which together count as `_PROFILE_WEIGHT`.

        `costs` [k] of an earlier fit, if there is one, say what the steps should have taken.
        """
        moments = cls()
        if steps := [s for s in samples if s.work.kind is kind]:
            rows, seconds = _matrix(steps)
            scale_s = seconds if costs is None else np.maximum(seconds, rows @ costs)
            moments.add(rows, seconds, scale_s, np.full(len(steps), _PROFILE_WEIGHT / len(steps)))
        return moments

    def add(
        self, rows: np.ndarray, seconds: np.ndarray, scale_s: np.ndarray, weights: np.ndarray
    ) -> None:
        """Add steps: features [n, k], times [n], what errors are divided by [n], weights [n]."""
        relative = rows / scale_s[:, None]
        weighted = relative * weights[:, None]
        self.gram += weighted.T @ relative
        self.target += weighted.T @ (seconds / scale_s)
        self.steps += float(weights.sum())

    def fade(self, steps: int) -> None:
        """Let what is here count less, by the arrival of `steps` more."""
        keep = (1 - 1 / _MEMORY_STEPS) ** steps
        self.gram *= keep
        self.target *= keep
        self.steps *= keep

    def scaled(self, speed: float) -> _Moments:
        """As if every step had taken `speed` times as long."""
        other = _Moments()
        # The rows are divided by the time: 1/speed once in the target, twice in the Gram matrix.
        other.gram = self.gram / speed**2
        other.target = self.target / speed
        other.steps = self.steps
        return other
