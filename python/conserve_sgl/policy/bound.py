"""What bounds offline work: in a step, and over the last seconds.

A plan names the bound of its step's time. Whether that is what holds offline work back depends on
what else there is: rows, KV, or work at all.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from conserve_sgl.policy.step import StepPlan, StepView

__all__ = ["Bound", "BoundSeconds", "bound_of"]

_WINDOW_S = 10.0


class Bound(StrEnum):
    """What bounds offline work. The first six are of a step's time, in the order in which they are
    looked at; a plan says one of these."""

    ONLINE_PROMPTS = "online prompts"
    ARRIVAL = "an arrival"
    TTFT = "slo.ttft"
    TPOT = "slo.tpot"
    GAP = "slo.longest_gap"
    YIELD = "slo.yield_ms"
    ROWS = "rows"
    ADAPTERS = "adapters"
    KV = "kv"
    DEVICE = "the device"
    NOTHING = "nothing waits"
    PAUSED = "paused"
    ENDING = "ending"

    @property
    def remedy(self) -> str:
        """A sentence: why, and what it would take."""
        return _REMEDIES[self]

    @property
    def is_at_rest(self) -> bool:
        """Whether offline work is not held back by anything that runs: it holds at once, whatever
        bounded the seconds before."""
        return self in _AT_REST


_AT_REST = frozenset({Bound.NOTHING, Bound.PAUSED, Bound.ENDING})

_REMEDIES = {
    Bound.ONLINE_PROMPTS: "online prompts have waited all along, and go first: this server is full",
    Bound.ARRIVAL: "online requests are announced all the time, and none gets as far as its prompt",
    Bound.TTFT: "a step with offline work would keep an arrival waiting longer than slo.ttft "
    "allows; a larger slo.ttft, or a faster step, makes room, and offline.min_share takes it",
    Bound.TPOT: "the online rows have no time to spare within slo.tpot; a larger slo.tpot, or "
    "fewer online requests at a time, makes room, and offline.min_share takes it",
    Bound.GAP: "no step with offline work is shorter than slo.longest_gap; a larger one makes room",
    Bound.YIELD: "no offline step is shorter than slo.yield_ms; a larger one makes room",
    Bound.ROWS: "no row is free; a larger --max-running-requests makes room, where states bound "
    "the rows a larger --max-mamba-cache-size",
    Bound.ADAPTERS: "a batch has no place for its adapters beside those of online requests; a "
    "larger --max-loras-per-batch makes room",
    Bound.KV: "no KV is free beyond what is reserved to online requests; a larger KV pool, or a "
    "smaller memory.online_reserve, makes room",
    Bound.DEVICE: "the device has other work all along",
    Bound.NOTHING: "nothing waits",
    Bound.PAUSED: "an operator paused it; conserve tune --offline run lets it go on",
    Bound.ENDING: "the server ends",
}


def bound_of(
    view: StepView,
    plan: StepPlan,
    *,
    held: bool = False,
    ends: bool = False,
    short_of_kv: bool = False,
    short_of_adapters: bool = False,
) -> Bound:
    """What bounds offline work in a step.

    Args:
        view: what the step was planned by.
        plan: of the step.
        held: whether an operator keeps offline work from running.
        ends: whether that is because the server ends.
        short_of_kv: whether an offline prompt that was tried last found no KV.
        short_of_adapters: whether a batch has no place for the adapter of any that waits.
    """
    if held:
        return Bound.ENDING if ends else Bound.PAUSED
    if not view.offline_waiting and not view.offline_resident:
        return Bound.NOTHING
    rows = view.offline_decoding.count + view.offline_parked.count
    if plan.bound in (Bound.ONLINE_PROMPTS, Bound.ARRIVAL) or plan.offline_decode_rows < rows:
        return plan.bound
    if view.offline_suspended:
        return plan.bound if view.online_present else Bound.DEVICE
    if not view.offline_waiting and view.offline_chunk is None:
        return Bound.NOTHING
    if view.offline_chunk is None and _no_row(view):
        return Bound.ROWS
    if short_of_adapters:
        return Bound.ADAPTERS
    if short_of_kv:
        return Bound.KV
    return plan.bound if plan.offline_prefill_tokens < view.chunk_tokens else Bound.DEVICE


def _no_row(view: StepView) -> bool:
    return min(view.max_rows - view.offline_resident, view.free_rows) <= 0


class BoundSeconds:
    """For how long each bound held.

    Attributes:
        total: seconds since the start, by bound.
        now: the bound of the step that runs.
    """

    def __init__(self) -> None:
        self.total = dict.fromkeys(Bound, 0.0)
        self.now = Bound.NOTHING
        self._since_s: float | None = None
        self._window_s = 0.0
        self._windows = dict.fromkeys(Bound, 0.0), dict.fromkeys(Bound, 0.0)

    def look(self, now_s: float, bound: Bound) -> None:
        """A step begins that `bound` bounds; the one before ran until now."""
        if self._since_s is not None:
            seconds = now_s - self._since_s
            self.total[self.now] += seconds
            self._windows[0][self.now] += min(seconds, _WINDOW_S)
        if now_s >= self._window_s + _WINDOW_S:
            self._window_s = now_s
            latest, before = self._windows
            for kind in Bound:
                before[kind], latest[kind] = latest[kind], 0.0
        self._since_s, self.now = now_s, bound

    def recent(self, now_s: float) -> dict[Bound, float]:
        """Seconds of each that held in the last 10 to 20 seconds; what holds now until now."""
        latest, before = self._windows
        seconds = {kind: latest[kind] + before[kind] for kind in Bound}
        if self._since_s is not None:
            seconds[self.now] += min(now_s - self._since_s, _WINDOW_S)
        return {kind: took_s for kind, took_s in seconds.items() if took_s > 0}

    def longest(self, now_s: float) -> Bound:
        """The one that held longest of late; where offline work is at rest now, that."""
        if self.now.is_at_rest:
            return self.now
        recent = self.recent(now_s)
        moving = {kind: took_s for kind, took_s in recent.items() if not kind.is_at_rest}
        return max(moving, key=moving.__getitem__, default=self.now)
