"""Online objectives, and the pace that keeps them: when each token is due.

Objectives are absolute (`25ms`) or relative (`1.25x`), which is relative to what the engine would
need without offline work, and so carries over from one machine to the next. Either way they are
kept over a request, as TPOT is defined, (last - first) / (n - 1): token k (from 1) is due at
`first + (k - 1) * tpot`, and tokens that came early leave slack to later ones. A step that takes
long at once is bounded by an objective of its own, the longest gap between two tokens: a reader
notices it, and TPOT does not show it.

Part of the slack is left alone (`Pace.next_due_s`). An answer may end with any token, online
prompts may come at any time and take the device for as long as they need, and the latency model
errs.
"""

from __future__ import annotations

from math import inf

import msgspec

__all__ = ["AIM", "Factor", "Pace", "Seconds", "Slo"]

AIM = 0.9
"""Share of the time beyond what online work alone takes that offline work is planned with. The rest
is for what happens outside the engine's steps: detokenizing, sending, the scheduler's own work."""

_SAVING = 0.8
"""Share of that time that goes into a request's reserve until the reserve is full: offline work
slows down for the first tokens of an answer and is not shut out by them."""

_REFILL = 0.65
"""Share of that time by which a reserve that was spent is filled again with every token. Offline
rows go on meanwhile: moving them out of the batch and in again costs more than it gains."""

_GAP_OBJECTIVES = 2.0
_LEAST_GAP_S = 0.05
"""The longest gap where none is given: twice the objective, and never less than a reader's eye
takes for continuous."""


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
    """The objectives of every online request.

    Args:
        ttft: from arrival to the first token.
        tpot: for every token after it, on average over the request.
        longest_gap: between two tokens; relative to `tpot`'s own value, or None for twice that
            and at least 50 ms.
    """

    ttft: Seconds | Factor
    tpot: Seconds | Factor
    longest_gap: Seconds | Factor | None = None

    def first_due_s(self, arrived_s: float) -> float:
        """When the first token of a request that arrived then is due; infinite if relative."""
        match self.ttft:
            case Seconds(seconds):
                return arrived_s + AIM * seconds
            case _:
                return inf

    def tpot_s(self, unloaded_s: float) -> float:
        """The objective in seconds, where online work alone takes `unloaded_s` a token."""
        match self.tpot:
            case Seconds(seconds):
                return seconds
            case Factor(factor):
                return factor * unloaded_s

    def longest_gap_s(self, tpot_s: float) -> float:
        """How long a gap may be planned at most, beside an objective of `tpot_s` for a step: where
        a step gives several tokens, that is as many times the objective of one."""
        match self.longest_gap:
            case Seconds(seconds):
                return seconds
            case Factor(factor):
                return factor * tpot_s
            case None:
                return max(_GAP_OBJECTIVES * tpot_s, _LEAST_GAP_S)

    def ttft_allowance_s(self, prefill_s: float) -> float:
        """How long a request may wait before its prompt runs.

        Args:
            prefill_s: predicted seconds of a typical prompt alone; 0 while none was seen.
        """
        match self.ttft:
            case Seconds(seconds):
                return max(AIM * seconds - prefill_s, 0.0)
            case Factor(factor):
                return (factor - 1) * prefill_s if prefill_s else inf

    def beside_s(self, prefill_s: float, online_s: float) -> float:
        """How long a step beside online rows may be for the sake of an arrival.

        An arrival finds a step that has begun and one that is planned behind it. An absolute
        objective holds for each request, so both may take half of what its own prefill leaves. A
        relative one holds over requests, and of a step in which it arrives a request waits for
        half: one step and a half of the online rows is what it would wait for anyhow.

        Args:
            prefill_s: predicted seconds of a typical prompt alone; 0 while none was seen.
            online_s: predicted seconds of a step of the online rows alone.
        """
        match self.ttft:
            case Seconds():
                return self.ttft_allowance_s(prefill_s) / 2
            case Factor(factor):
                return online_s + (factor - 1) * (prefill_s + 1.5 * online_s)


class Pace(msgspec.Struct, frozen=True):
    """When the tokens of online rows are due, in a step with offline work in it.

    Args:
        tpot_s: the objective of now; 0 while it is relative and nothing online has run.
        unloaded_s: what online work alone takes a token; 0 while nothing online has run.
        reserve_s: what a request should have to spare once it has run for a while: what online
            prompts may take from it at once.
        aim: share of the time beyond `unloaded_s` that offline work is planned with.
        step_tokens: tokens that a step gives a row, in the mean: they come at once, and are in time
            when the last of them is.
    """

    tpot_s: float = 0.0
    unloaded_s: float = 0.0
    reserve_s: float = 0.0
    aim: float = AIM
    step_tokens: float = 1.0

    def next_due_s(self, first_s: float, tokens: float) -> tuple[float, float]:
        """When the step after the first `tokens` is due.

        Args:
            first_s: when the first token came.
            tokens: how many came, those in flight included.

        Returns:
            With the reserve kept, and with it spent; the second is never earlier.
        """
        tokens += self.step_tokens - 1
        extra_s = self._extra_s * tokens
        spare_s = (1 - self.aim) * extra_s
        saved_s = max(spare_s, min(self.reserve_s, _SAVING * extra_s))
        due_s = first_s + self.tpot_s * tokens
        return due_s - saved_s, due_s - spare_s

    @property
    def saving_s(self) -> float:
        """How long a step may take that fills a reserve again which online prompts have spent."""
        return self.step_tokens * (self.unloaded_s + (1 - _REFILL) * self._extra_s)

    @property
    def _extra_s(self) -> float:
        return max(self.tpot_s - self.unloaded_s, 0.0)
