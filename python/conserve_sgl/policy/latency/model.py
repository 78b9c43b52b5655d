"""The latency model: predicts how long a step takes, and learns from the steps that ran."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import mul

import msgspec

from conserve_sgl.policy.latency.costs import DECODE_KNEE_ROWS, Coefficients, features, tokens_s
from conserve_sgl.policy.latency.errors import ErrorQuantiles, Errors
from conserve_sgl.policy.latency.fit import Fit, cross_validated
from conserve_sgl.policy.latency.work import StepKind, StepSample, StepWork

__all__ = ["MAX_CHUNK_TOKENS", "LatencyModel", "prompt_token_s"]

MAX_CHUNK_TOKENS = 1 << 20
"""What `prefill_tokens_within_s` answers at most, also when prompt tokens cost nothing."""

_REFIT_EVERY = 32


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
        self._fit = Fit(self.samples)
        self._errors = Errors(cross_validated(self.samples))
        self._use_fit()

    @classmethod
    def of_coefficients(cls, coefficients: Coefficients, *, layers: int = 1) -> LatencyModel:
        """A model that predicts with `coefficients`, as if a profile without noise had them."""
        k = msgspec.structs.astuple(coefficients)
        grid = [StepSample(w, t) for w in _grid() if (t := sum(map(mul, k, features(w)))) > 0]
        return cls(grid, layers=layers)

    # --------------------------------------------------------------- predicting

    def predict_s(self, work: StepWork) -> float:
        """Seconds that a step of `work` takes, in the mean; grows with every part of it."""
        k = self.coefficients
        seconds = k.step
        rows = work.decode_rows
        if work.prefill_tokens:
            seconds += k.prefill + k.prompt * work.prompts + k.attention * work.prefill_attention
            seconds += tokens_s(k, work.prefill_tokens + rows)
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
        fixed_s -= tokens_s(k, before + rows + 1)
        left_s = budget_s - fixed_s

        def fits(tokens: int) -> bool:
            pairs = tokens * (resident + tokens / 2)
            return tokens_s(k, before + rows + tokens) + k.attention * pairs <= left_s

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
            self._errors.observe(work.kind, seconds / predicted_s - 1)
        self._pending.append(StepSample(work, seconds))
        if len(self._pending) >= _REFIT_EVERY:
            pending, self._pending = self._pending, []
            self._errors.refit(self._fit.learn(pending))
            self._use_fit()

    def _use_fit(self) -> None:
        self.coefficients = self._fit.coefficients
        self._upper = self._errors.uppers
        self.bias = self._errors.bias

    # ---------------------------------------------------------------- reporting

    def errors(self, kind: StepKind | None = None) -> ErrorQuantiles:
        """Of the recent steps of one kind, or of all; before any were observed, the profile's."""
        return self._errors.quantiles(kind)

    @property
    def is_biased(self) -> bool:
        """Whether steps are off to one side by more than a tenth, though the fit follows them."""
        return self._errors.is_biased

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


def _grid() -> list[StepWork]:
    prompts = [(n, c) for n in (1, 16, 64, 128, 256, 1024) for c in (0, 512, 2048)]
    decodes = [[c] * rows for rows in (1, 4, 8, 16, 64) for c in (64, 512, 2048)]
    return [
        *(StepWork.of([p] * n) for p in prompts for n in (1, 2)),
        *(StepWork.of((), d) for d in decodes),
        *(StepWork.of([p], d) for p in prompts[::3] for d in decodes),
    ]
