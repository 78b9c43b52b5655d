"""How long a step of the engine takes, predicted from what is in it.

The step time is a sum of a few named costs (`Coefficients`), linear in the work but for knees where
a step turns from one regime into another; ConServe (arXiv 2410.01228v2) and Sarathi fit the same
form without the knees. Tokens have knees of both kinds: the first may be dearer (a CPU turns from
memory bound to compute bound), and those beyond a few hundred may be (a GPU computes the first ones
while it reads the weights, and while the host launches the step). Costs are found by non-negative
least squares, which drops those that do not help, with every residual divided by the time measured
(or predicted, whichever is longer): a decode step of 5 ms counts as much as a prefill of 500 ms.

What is fitted is a profile (steps measured once, kept) together with the steps observed since,
which fade. Prefill, decode and mixed steps fade apart, so an hour of decoding does not forget what
a prompt costs; and the profile stays as the shape where nothing recent was seen, scaled to the
speed of now.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum

import msgspec
import numpy as np

__all__ = [
    "Coefficients",
    "ErrorQuantiles",
    "LatencyModel",
    "StepKind",
    "StepSample",
    "StepWork",
    "prompt_token_s",
]

PREFILL_KNEE_TOKENS = 128
WIDE_KNEES_TOKENS = (256, 512, 1024)
DECODE_KNEE_ROWS = 8

_REFIT_EVERY = 32
_MEMORY_STEPS = 512
_PROFILE_WEIGHT = 32.0
"""Steps of a kind that the profile counts as; recent steps count up to `_MEMORY_STEPS`."""

_OUTLIER = 0.25
"""Relative error beyond which a step counts less (Huber): a pause of the machine is not its speed,
and yet a machine that became slower for good is followed."""

_ERRORS_KEPT = 256
_UPPER = 0.90
_LARGEST_MARGIN = 0.3
_HEALING = 0.05
"""Of the margin of a kind of step that did not run since the last fit, what it loses: outliers must
not starve what then never runs to prove them wrong."""
_BIAS_LIMIT = 0.10
_BIAS_STEPS = 128


class StepKind(IntEnum):
    """What a step holds; errors and forgetting are kept apart by it."""

    PREFILL = 0
    DECODE = 1
    MIXED = 2


class StepWork(msgspec.Struct, frozen=True):
    """What one step computes.

    Args:
        prefill_tokens: new prompt tokens.
        prefill_attention: sum over prompts of P * (C + P / 2), for P new tokens over C resident
            ones (cached, or of earlier chunks); the query-key pairs that attention sees.
        decode_rows: requests that get one token each.
        decode_context: their tokens in KV, summed.
        prompts: requests that `prefill_tokens` belong to.
    """

    prefill_tokens: int = 0
    prefill_attention: float = 0.0
    decode_rows: int = 0
    decode_context: int = 0
    prompts: int = 0

    @classmethod
    def of(
        cls, prompts: Iterable[tuple[int, int]] = (), decode_contexts: Iterable[int] = ()
    ) -> StepWork:
        """The work of `prompts`, each (new tokens, resident tokens), and of decode rows."""
        tokens, attention, count = 0, 0.0, 0
        for new, resident in prompts:
            tokens += new
            attention += new * (resident + new / 2)
            count += 1
        rows = context = 0
        for length in decode_contexts:
            rows += 1
            context += length
        return cls(tokens, attention, rows, context, count)

    def plus(self, other: StepWork) -> StepWork:
        """Both in one step."""
        return StepWork(
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_attention + other.prefill_attention,
            self.decode_rows + other.decode_rows,
            self.decode_context + other.decode_context,
            self.prompts + other.prompts,
        )

    def plus_prompt(self, new: int, resident: int) -> StepWork:
        """With one more prompt (or chunk) of `new` tokens over `resident` ones; 0 adds nothing."""
        if new <= 0:
            return self
        return StepWork(
            self.prefill_tokens + new,
            self.prefill_attention + new * (resident + new / 2),
            self.decode_rows,
            self.decode_context,
            self.prompts + 1,
        )

    @property
    def kind(self) -> StepKind:
        """Which errors apply; a step of nothing counts as decode."""
        if not self.prefill_tokens:
            return StepKind.DECODE
        return StepKind.MIXED if self.decode_rows else StepKind.PREFILL


class StepSample(msgspec.Struct, frozen=True, array_like=True):
    """A step that was measured."""

    work: StepWork
    seconds: float


class Coefficients(msgspec.Struct, frozen=True):
    """The costs of a step, in seconds; all at least 0. Their order is that of `_features`.

    Args:
        step: of any step.
        prefill: of a step with a prompt in it.
        prompt: of each prompt.
        token: of each token of a step with a prompt in it, those of the rows included.
        early_token: of each of the first PREFILL_KNEE_TOKENS of them, on top.
        wide_token: of each beyond the first of WIDE_KNEES_TOKENS, on top.
        wider_token: of each beyond the second.
        widest_token: of each beyond the third.
        attention: of each query-key pair of a prompt.
        decode: of a step with decode rows in it.
        batch: of a step with two decode rows or more, on top: one row multiplies vectors.
        row: of each decode row.
        early_row: of each of the first DECODE_KNEE_ROWS decode rows, on top.
        context: of each token of KV that a decode row reads.
        mixed: of a step with both, on top.
        mixed_row: of each decode row that runs beside a prompt, on top.
        mixed_context: of each token of KV that such a row reads, on top: a kernel made for prompts
            may compute a whole tile of queries for it.
    """

    step: float = 0.0
    prefill: float = 0.0
    prompt: float = 0.0
    token: float = 0.0
    early_token: float = 0.0
    wide_token: float = 0.0
    wider_token: float = 0.0
    widest_token: float = 0.0
    attention: float = 0.0
    decode: float = 0.0
    batch: float = 0.0
    row: float = 0.0
    early_row: float = 0.0
    context: float = 0.0
    mixed: float = 0.0
    mixed_row: float = 0.0
    mixed_context: float = 0.0


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


class _Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    layers: int
    samples: tuple[StepSample, ...]


class LatencyModel:
    """Predicts step times; `observe` is the only thing that changes it.

    `coefficients` are the costs of now, and `bias` the median relative error of the last observed
    steps (above 0, they were slower than said); both are of the last fit.

    Args:
        samples: the profile, steps measured on this engine.
        layers: decoder layers of the model.

    Raises:
        ValueError: no sample, or one without a positive time.
    """

    def __init__(self, samples: Sequence[StepSample], *, layers: int) -> None:
        if not samples or any(not 0 < s.seconds < math.inf for s in samples):
            raise ValueError("a profile is at least one step, each with a positive time")
        self.samples = tuple(samples)
        self.layers = layers
        self._pending: list[StepSample] = []
        self._errors = {kind: deque[float](maxlen=_ERRORS_KEPT) for kind in StepKind}
        for kind, error in _cross_validated(self.samples):
            self._errors[kind].append(error)
        self._recent = {kind: _Moments() for kind in StepKind}
        first = _fit(self.samples)
        self._profile = {k: _Moments.of_profile(self.samples, k, first) for k in StepKind}
        self._profile_costs = _solve(self._profile.values())
        self._speed = dict.fromkeys(StepKind, 1.0)
        self._trust = dict.fromkeys(StepKind, 1.0)
        self._signed = deque[float](maxlen=_BIAS_STEPS)
        self._use(self._profile_costs)

    @classmethod
    def of_coefficients(cls, coefficients: Coefficients, *, layers: int = 1) -> LatencyModel:
        """A model that predicts with `coefficients`, as if a profile without noise had them."""
        k = np.array(msgspec.structs.astuple(coefficients))
        grid = [StepSample(w, t) for w in _grid() if (t := float(k @ _features(w))) > 0]
        return cls(grid, layers=layers)

    # --------------------------------------------------------------- predicting

    def predict_s(self, work: StepWork) -> float:
        """Seconds that a step of `work` takes, in the mean; grows with every part of it."""
        k = self.coefficients
        seconds = k.step
        rows = work.decode_rows
        if work.prefill_tokens:
            seconds += k.prefill + k.prompt * work.prompts + k.attention * work.prefill_attention
            seconds += _tokens_s(k, work.prefill_tokens + rows)
            if rows:
                seconds += k.mixed + k.mixed_row * rows + k.mixed_context * work.decode_context
        if rows:
            early = rows if rows < DECODE_KNEE_ROWS else DECODE_KNEE_ROWS
            seconds += k.decode + k.row * rows + k.early_row * early
            seconds += k.context * work.decode_context
            if rows > 1:
                seconds += k.batch
        return seconds

    def upper_s(self, work: StepWork) -> float:
        """Seconds that 9 of 10 such steps stay under; grows with the work within one kind.

        At most 1.3 times the mean, and less for a kind of step that has not run lately: what it
        takes is then found out by running it."""
        return self.predict_s(work) * self._upper[work.kind]

    def layer_s(self, work: StepWork, layers: int) -> float:
        """Mean seconds of `layers` of the model's layers, for a step of `work`.

        The time outside the layers (embedding, head, sampling) is counted to them in proportion.
        """
        return self.predict_s(work) * layers / self.layers

    def prefill_tokens_within_s(
        self,
        budget_s: float,
        resident: int,
        base: StepWork = StepWork(),  # noqa: B008
    ) -> int:
        """The longest chunk over `resident` tokens that, beside `base`, stays within the budget.

        Measured with `upper_s`. 0 when not even one token fits; bounded by `MAX_CHUNK_TOKENS`.
        """
        first = base.plus_prompt(1, resident)
        budget_s /= self._upper[first.kind]
        k, rows, before = self.coefficients, base.decode_rows, base.prefill_tokens
        # What does not depend on the chunk's length, once and not for every length tried.
        fixed_s = self.predict_s(first) - k.attention * (resident + 0.5)
        fixed_s -= _tokens_s(k, before + rows + 1)
        left_s = budget_s - fixed_s

        def fits(tokens: int) -> bool:
            pairs = tokens * (resident + tokens / 2)
            return _tokens_s(k, before + rows + tokens) + k.attention * pairs <= left_s

        return _largest(fits, MAX_CHUNK_TOKENS)

    # ----------------------------------------------------------------- learning

    def observe(self, work: StepWork, seconds: float) -> None:
        """Take in a step that was measured; every 32nd time the costs are fitted again.

        A step without work or without a positive, finite time is passed over.
        """
        predicted_s = self.predict_s(work)
        if not (work.prefill_tokens or work.decode_rows) or not 0 < seconds < math.inf:
            return
        if predicted_s > 0:
            error = seconds / predicted_s - 1
            self._errors[work.kind].append(error)
            self._signed.append(error)
        self._pending.append(StepSample(work, seconds))
        if len(self._pending) >= _REFIT_EVERY:
            self._refit()

    def _refit(self) -> None:
        pending, self._pending = self._pending, []
        for kind in StepKind:
            steps = [s for s in pending if s.work.kind is kind]
            self._trust[kind] = 1.0 if steps else self._trust[kind] * (1 - _HEALING)
            if steps:
                self._learn(kind, steps)
        scaled = [self._profile[kind].scaled(self._speed[kind]) for kind in StepKind]
        self._use(_solve([*scaled, *self._recent.values()]))

    def _learn(self, kind: StepKind, steps: list[StepSample]) -> None:
        rows, seconds = _matrix(steps)
        by_profile = rows @ self._profile_costs
        if self._profile[kind].steps and by_profile.min() > 0:
            keep = (1 - 1 / _BIAS_STEPS) ** len(steps)
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
        self._upper = tuple(1 + self._margin(kind) for kind in StepKind)
        self.bias = _quantile(sorted(self._signed), 0.5)

    def _margin(self, kind: StepKind) -> float:
        above = _quantile(sorted(self._errors[kind]), _UPPER)
        return min(max(above, 0.0), _LARGEST_MARGIN) * self._trust[kind]

    # ---------------------------------------------------------------- reporting

    def errors(self, kind: StepKind | None = None) -> ErrorQuantiles:
        """Of the recent steps of one kind, or of all; before any were observed, the profile's."""
        kinds = StepKind if kind is None else (kind,)
        return ErrorQuantiles.of(e for k in kinds for e in self._errors[k])

    @property
    def is_biased(self) -> bool:
        """Whether steps are off to one side by more than a tenth, though the fit follows them."""
        return len(self._signed) == _BIAS_STEPS and abs(self.bias) > _BIAS_LIMIT

    # ------------------------------------------------------------------ storing

    def to_json(self) -> bytes:
        """The profile, without what was observed since."""
        return msgspec.json.encode(_Stored(self.layers, self.samples))

    @classmethod
    def from_json(cls, text: bytes | str) -> LatencyModel:
        """The model that `to_json` wrote.

        Raises:
            ValueError: `text` is not one (msgspec's decoding errors are ValueErrors too).
        """
        stored = msgspec.json.decode(text, type=_Stored)
        return cls(stored.samples, layers=stored.layers)


def prompt_token_s(predict_s: Callable[[StepWork], float]) -> float:
    """Seconds of one more token of a prompt of some hundred tokens, to a latency model."""
    long, short = StepWork.of([(1024, 0)]), StepWork.of([(512, 0)])
    return (predict_s(long) - predict_s(short)) / 512


MAX_CHUNK_TOKENS = 1 << 20
"""What `prefill_tokens_within_s` answers at most, also when prompt tokens cost nothing."""


def _features(work: StepWork) -> list[float]:
    """What each of `Coefficients` is multiplied by, in their order."""
    tokens, rows = work.prefill_tokens, work.decode_rows
    together = tokens + rows if tokens else 0
    return [
        1.0,
        float(tokens > 0),
        float(work.prompts),
        float(together),
        float(min(together, PREFILL_KNEE_TOKENS)),
        *(float(max(together - knee, 0)) for knee in WIDE_KNEES_TOKENS),
        float(work.prefill_attention),
        float(rows > 0),
        float(rows > 1),
        float(rows),
        float(min(rows, DECODE_KNEE_ROWS)),
        float(work.decode_context),
        float(tokens > 0 and rows > 0),
        float(rows if tokens else 0),
        float(work.decode_context if tokens else 0),
    ]


def _tokens_s(k: Coefficients, tokens: int) -> float:
    """The part of a step's time that its tokens make, rows included; not in a decode step."""
    seconds = k.token * tokens
    seconds += k.early_token * (tokens if tokens < PREFILL_KNEE_TOKENS else PREFILL_KNEE_TOKENS)
    wide, wider, widest = WIDE_KNEES_TOKENS
    if tokens > wide:
        seconds += k.wide_token * (tokens - wide)
        if tokens > wider:
            seconds += k.wider_token * (tokens - wider)
            if tokens > widest:
                seconds += k.widest_token * (tokens - widest)
    return seconds


def _largest(fits: Callable[[int], bool], at_most: int) -> int:
    """The largest number up to `at_most` that fits, where all smaller ones do; 0 if none does."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= at_most and fits(high):
        low, high = high, 2 * high
    high = min(high, at_most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


_SIZE = len(msgspec.structs.fields(Coefficients))


def _matrix(samples: Sequence[StepSample]) -> tuple[np.ndarray, np.ndarray]:
    rows = np.array([_features(s.work) for s in samples])
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


def _fit(samples: Sequence[StepSample], costs: np.ndarray | None = None) -> np.ndarray:
    """Costs [k] of a profile; `costs` of an earlier fit keep lucky short times from ruling it."""
    return _solve(_Moments.of_profile(samples, kind, costs) for kind in StepKind)


def _cross_validated(samples: Sequence[StepSample]) -> list[tuple[StepKind, float]]:
    """Relative errors of each half of the samples under costs fitted to the other half."""
    errors: list[tuple[StepKind, float]] = []
    for held_out in (0, 1):
        fitted = [s for i, s in enumerate(samples) if i % 2 != held_out] or samples
        costs = _fit(fitted, _fit(fitted))
        for sample in samples[held_out::2]:
            predicted_s = float(costs @ _features(sample.work))
            if predicted_s > 0:
                errors.append((sample.work.kind, sample.seconds / predicted_s - 1))
    return errors


def _grid() -> list[StepWork]:
    prompts = [(n, c) for n in (1, 16, 64, 128, 256, 1024) for c in (0, 512, 2048)]
    decodes = [[c] * rows for rows in (1, 4, 8, 16, 64) for c in (64, 512, 2048)]
    return [
        *(StepWork.of([p] * n) for p in prompts for n in (1, 2)),
        *(StepWork.of((), d) for d in decodes),
        *(StepWork.of([p], d) for p in prompts[::3] for d in decodes),
    ]


def _quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest of `ordered` that at least `share` of them do not exceed; 0 of none."""
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else 0.0
