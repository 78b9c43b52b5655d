"""Online objectives: when tokens are due, absolutely or relative to the engine's own speed.

Absolute: the first token is due `ttft` after the request's arrival, and token k (from 1) at
`first + (k - 1) * tpot`, `first` being when the first token came. A request whose every token is
in time so has a TPOT, (last - first) / (n - 1), within the objective wherever it ends. Tokens that
came early leave slack to later ones, but no gap may be planned longer than twice the objective: a
reader notices the longest gap, which TPOT does not show.

Relative, `1.25x`: of what the engine would need without offline work, by the latency model. It
carries over from one machine to the next, and follows the load: the objective of a step is the
predicted time of its online work alone, times the factor.
"""

from __future__ import annotations

from math import inf

import msgspec

from conserve_sgl.policy.step import StepView

__all__ = ["Factor", "Seconds", "Slo"]

_LONGEST_GAP = 2.0

_AIM = 0.9
"""Share of the objective that offline work is planned with. The rest is for online prompts, which
may arrive at any time and want the slack of the rows that decode, and for what happens outside the
engine's steps: detokenizing, sending, the scheduler's own work."""

_SPARE_GAPS = 1.0
"""Gaps of the objective that offline work leaves to spare at least. An answer may end with any
token, and then nothing makes up for a late step: a tenth of a short answer is less than a step."""

_DELIVERY = 0.97
"""Share of the objective that online work alone is planned with."""


class Seconds(msgspec.Struct, frozen=True):
    """An absolute objective."""

    seconds: float

    def __post_init__(self) -> None:
        if not 0 < self.seconds < inf:
            raise ValueError("an objective is a time above 0")


class Factor(msgspec.Struct, frozen=True):
    """An objective relative to what the engine needs without offline work."""

    factor: float

    def __post_init__(self) -> None:
        if not 1 <= self.factor < inf:
            raise ValueError("a relative objective is 1x or more: online work alone takes 1x")


class Slo(msgspec.Struct, frozen=True):
    """The objectives of every online request: time to first token, and per token after it."""

    ttft: Seconds | Factor
    tpot: Seconds | Factor

    def first_due_s(self, arrived_s: float) -> float:
        """When the first token of a request that arrived then is due; infinite if relative."""
        match self.ttft:
            case Seconds(seconds):
                return arrived_s + _AIM * seconds
            case _:
                return inf

    def next_due_s(self, first_s: float, tokens: int) -> tuple[float, float]:
        """When the token after the first `tokens` is due; infinite if relative.

        Args:
            first_s: when the first token came.
            tokens: how many came, the one in flight included.

        Returns:
            With offline work in the step, and without; the second is never earlier.
        """
        match self.tpot:
            case Seconds(seconds):
                taken_s = seconds * tokens
                spare_s = max((1 - _AIM) * taken_s, _SPARE_GAPS * seconds)
                return first_s + taken_s - spare_s, first_s + _DELIVERY * taken_s
            case _:
                return inf, inf

    def slack_s(self, view: StepView, online_s: float) -> float:
        """How long a step with offline work may take; infinite when no online row decodes.

        Args:
            view: of the step.
            online_s: predicted seconds of a step of the online rows alone.
        """
        if not view.online_decoding.count:
            return inf
        match self.tpot:
            case Factor(factor):
                return factor * online_s
            case Seconds(seconds):
                return self._slack_to_s(view.offline_due_s, view, seconds)

    def slack_of_online_s(self, view: StepView) -> float:
        """How long a step may take whatever is in it; infinite for a relative objective, which
        says nothing of online requests that delay each other."""
        match self.tpot:
            case Seconds(seconds):
                return self._slack_to_s(view.online_due_s, view, seconds)
            case _:
                return inf

    @staticmethod
    def _slack_to_s(due_s: float, view: StepView, tpot_s: float) -> float:
        return min(due_s - max(view.now_s, view.free_at_s), _LONGEST_GAP * tpot_s)

    def ttft_allowance_s(self, prefill_s: float) -> float:
        """How long a request may wait before its prompt runs.

        Args:
            prefill_s: predicted seconds of a typical prompt alone; 0 while none was seen.
        """
        match self.ttft:
            case Seconds(seconds):
                return max(_AIM * seconds - prefill_s, 0.0)
            case Factor(factor):
                return (factor - 1) * prefill_s if prefill_s else inf
