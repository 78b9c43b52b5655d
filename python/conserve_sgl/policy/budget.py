"""The latency-aware budget: offline work takes the slack that online deadlines leave.

What bounds a step depends on who would wait for it:

    online rows decode       their slack: the next token of every row has a deadline (`Pace`), and
                             no gap is longer than `slo.longest_gap`. And an arrival, which must
                             still be in time (`Slo.beside_s`).
    no online request        an arrival alone: `yield_s` for what cannot be interrupted, or a tenth
                             of what `slo.ttft` leaves where that is more
    an arrival is announced  nothing offline starts that no online row decodes beside
    online prompts wait      they run as SGLang runs them, whole and first, whatever the objectives;
                             nothing offline beside them

`offline.min_share` is above all of it but the last: what offline work has earned by it and did not
get, a step may take beside online rows.

The shape of a step is chosen by what it costs on this engine, which only the latency model knows.
Offline rows join the rows that decode, as many as fit. Offline prompts ride in the same step, or
get a step of their own between two decode steps, whichever computes a token in less time within the
slack; where even the cheaper one is much dearer than a step in the whole of the longest gap would
be, the rows decode, and their slack grows until it is worth it.
"""

from __future__ import annotations

from math import inf
from typing import Protocol

import msgspec

from conserve_sgl.policy.bound import Bound
from conserve_sgl.policy.floor import Floor
from conserve_sgl.policy.latency import StepWork
from conserve_sgl.policy.margin import Margin
from conserve_sgl.policy.reserve import OnlineReserve
from conserve_sgl.policy.slo import AIM, Pace, Seconds, Slo
from conserve_sgl.policy.step import Rows, StepPlan, StepView

__all__ = ["SlackBudget", "StepTimes"]

_ROWS_KEPT_SHARE = 0.9
"""Offline rows beyond what decodes now come back only when they are at least a tenth more: moving
rows in and out of the batch costs, and the slack of two steps is never quite the same."""

_ROWS_STAY_SHARE = 0.75
"""And rows that decode stay where three quarters of them fit and none would be late for it."""

_FLOOR_STEPS = 2.0
"""An offline step may take twice the time of one row's step whatever `yield_s` says: below that
there is little left to bound, and offline work would run at small batches."""

_LEAST_STEPS = 1.5
"""And half as much again as one row's step whatever the time to first token allows: offline work
would else run at batch size one."""

_IDLE_SHARE = 0.1
"""Of what `slo.ttft` leaves to an arrival, what a step may take where nothing online runs."""

_DEAR = 1.1
"""How much more a prompt token may cost than in the largest step of this shape that could ever be
granted, before it is better to wait for slack."""

_PATIENCE_S = 2.0
"""How long offline prompts wait for slack. Then one chunk may be dear, and spend the reserve of
online rows, though not their objective: beside short answers there is always a row that has just
begun."""

_FULL_SHARE = 0.9
"""Share of the longest gap from which on slack does not grow worth waiting for."""

_LEAST_AIM = 0.5
_LEAST_WAIT = 0.25
"""Shares of the time to spare, and of the wait that an arrival is allowed, that are left to offline
work however many online requests were late: where they are late anyhow, nothing else would run."""

_STALL_KEPT = 0.999
"""What remains, with every token of the online rows, of the longest time that online prompts took
from them at once: that time is the reserve of a row, besides one step's."""

_TYPICAL = 0.1
_UNLOADED = 0.05
"""Weights of the newest observation in moving averages: of an online prefill, of a token's time."""


class StepTimes(Protocol):
    """What the budget asks of a latency model; see `policy.latency.LatencyModel`."""

    def predict_s(self, work: StepWork) -> float:
        """Mean seconds of a step of `work`."""
        ...

    def upper_s(self, work: StepWork) -> float:
        """Seconds that a step of `work` stays within nearly always."""
        ...

    def prefill_tokens_within_s(self, budget_s: float, resident: int, base: StepWork) -> int:
        """The longest chunk over `resident` tokens that fits `budget_s` beside `base`."""
        ...


class _Step(msgspec.Struct, frozen=True):
    """What is the same for all decisions of one step; seconds.

    Args:
        online: the online rows that decode.
        online_s: what a step of them alone takes.
        slack_s: until their next token is due.
        late_s: until it is late, their reserve spent.
        gap_s: the longest gap; infinite without online rows.
        arrival_s: what an arrival may have to wait for the step.
    """

    online: StepWork
    online_s: float
    slack_s: float
    late_s: float
    gap_s: float
    arrival_s: float

    @property
    def bound_s(self) -> float:
        return min(self.slack_s, self.arrival_s)

    @property
    def bound(self) -> Bound:
        if not self.online.decode_rows:
            return Bound.YIELD
        if self.arrival_s < self.slack_s:
            return Bound.TTFT
        return Bound.GAP if self.slack_s == self.gap_s else Bound.TPOT


class _Chunk(msgspec.Struct, frozen=True):
    """Offline prompt tokens of a step: how many, how they run, and seconds for each."""

    tokens: int = 0
    rides: bool = False
    in_slices: bool = False
    each_s: float = inf


class SlackBudget:
    """See the module's text. `plan` changes nothing but what it learns of the online demand.

    `pace` says when tokens are due, from one plan to the next.

    Args:
        times: the latency model; may be refitted between two plans.
        slo: the online objectives.
        yield_s: how long an arrival may have to wait for offline work that cannot be interrupted
            where nothing online runs.
        reserve: sizes the KV that offline admissions leave free.
        smallest_chunk: prompt tokens below which a chunk is not worth a step: the step's constant
            cost would outweigh it. At least a page.
        min_share: share of the time that offline work gets in any case.
    """

    def __init__(
        self,
        times: StepTimes,
        *,
        slo: Slo,
        yield_s: float,
        reserve: OnlineReserve,
        smallest_chunk: int,
        min_share: float = 0.0,
    ) -> None:
        self._times = times
        self._reserve = reserve
        self._smallest_chunk = smallest_chunk
        self._floor = Floor(min_share)
        self._typical_prefill_s = 0.0
        self._unloaded_s = 0.0
        self._planned_prefill_s = self._stalled_s = self._longest_stall_s = 0.0
        self._fed_s = 0.0
        self._step_tokens = 1.0
        self.aim_at(slo, yield_s=yield_s)

    def aim_at(self, slo: Slo, *, yield_s: float) -> None:
        """Plan for other objectives from here on; what was learnt of the demand stays."""
        self._slo, self._yield_s = slo, yield_s
        self._tpot_margin = Margin(most=AIM, least=_LEAST_AIM)
        self._ttft_margin = Margin(most=1.0, least=_LEAST_WAIT)
        self._set_pace()

    def online_ended(self, *, ttft_s: float, tpot_s: float | None) -> None:
        """Take in what an online request got; `tpot_s` is None for an answer of one token.

        Absolute objectives only: what a relative one is of varies from request to request, alone
        as beside offline work.
        """
        if isinstance(self._slo.ttft, Seconds):
            self._ttft_margin.saw(late=ttft_s > self._slo.ttft.seconds)
        tpot = self._slo.tpot
        if isinstance(tpot, Seconds) and tpot_s is not None and self._unloaded_s < tpot.seconds:
            self._tpot_margin.saw(late=tpot_s > tpot.seconds)

    @property
    def margins(self) -> dict[str, float]:
        """Of the time to spare by each objective, the share that offline work may use; outcomes
        move it."""
        return {"ttft": self._ttft_margin.share, "tpot": self._tpot_margin.share}

    @property
    def objectives_s(self) -> dict[str, float | None]:
        """The objectives as times: `ttft`, `tpot` and `longest_gap`. A relative one is None before
        online work was seen; of TTFT it is that of a typical prompt, for one that waits alone."""
        ttft = self._slo.ttft
        typical_s = self._typical_prefill_s
        ttft_s = ttft.seconds if isinstance(ttft, Seconds) else ttft.factor * typical_s
        tpot_s = self.pace.tpot_s
        gap_s = self._slo.longest_gap_s(tpot_s) if tpot_s else 0.0
        return {"ttft": ttft_s or None, "tpot": tpot_s or None, "longest_gap": gap_s or None}

    def plan(self, view: StepView) -> StepPlan:
        """See `Policy.plan`."""
        if view.step_tokens != self._step_tokens:
            self._step_tokens = view.step_tokens
            self._set_pace()
        self._stalled_s += 0.0 if view.rows_decoded else self._planned_prefill_s
        self._planned_prefill_s = 0.0
        self._floor.earn(view.now_s, waits=bool(view.offline_waiting or view.offline_resident))
        step = self._measure(view)
        if view.online_prompts:
            self._online_prefill_runs(view)
            # Rows matter only if the prompts find no KV, and the step decodes after all.
            rows = self._rows_that_fit(view, step)
            return self._plan(view, step, rows=rows, bound=Bound.ONLINE_PROMPTS)
        if view.online_arriving and not view.online_decoding.count:
            return self._plan(view, step, rows=0, bound=Bound.ARRIVAL)
        rows = self._rows_that_fit(view, step)
        chunk = _Chunk() if view.offline_suspended else self._next_chunk(view, step, rows)
        if view.online_decoding.count and (chunk.rides or not chunk.tokens):
            self._online_rows_run(step)
        if self._floor.owed_s:
            self._floor.spend(self._offline_s(view, step, rows, chunk))
        return self._plan(view, step, rows=rows, chunk=chunk)

    # -------------------------------------------------------- what online work takes

    def _online_prefill_runs(self, view: StepView) -> None:
        tokens = sum(prompt.new_tokens for prompt in view.online_prompts)
        first = view.online_prompts[0]
        one_s = self._times.predict_s(StepWork.of([(first.new_tokens, first.resident_tokens)]))
        self._typical_prefill_s = _follow(self._typical_prefill_s, one_s, _TYPICAL)
        if view.online_decoding.count:
            all_of_them = (min(tokens, view.chunk_tokens), first.resident_tokens)
            self._planned_prefill_s = self._times.predict_s(StepWork.of([all_of_them]))

    def _online_rows_run(self, step: _Step) -> None:
        """A token of the online rows would have taken so long without offline work."""
        taken_s = (step.online_s + self._stalled_s) / self._step_tokens
        self._longest_stall_s = max(self._stalled_s, _STALL_KEPT * self._longest_stall_s)
        self._stalled_s = 0.0
        self._unloaded_s = _follow(self._unloaded_s, taken_s, _UNLOADED)
        self._set_pace()

    def _set_pace(self) -> None:
        tpot_s = self._slo.tpot_s(self._unloaded_s)
        reserve_s = self._step_tokens * tpot_s + self._longest_stall_s
        self.pace = Pace(
            tpot_s=tpot_s,
            unloaded_s=self._unloaded_s,
            reserve_s=reserve_s,
            aim=self._tpot_margin.share,
            step_tokens=self._step_tokens,
        )

    # ------------------------------------------------------------ the step's bound

    def _measure(self, view: StepView) -> _Step:
        if not view.online_decoding.count:
            return _Step(StepWork(), 0.0, inf, inf, inf, self._idle_bound_s(view))
        online = _decode(view.online_decoding)
        online_s = self._times.predict_s(online)
        if not self._unloaded_s:
            self._unloaded_s = online_s / self._step_tokens
            self._set_pace()
        gap_s = self._slo.longest_gap_s(self._step_tokens * self.pace.tpot_s)
        begins_s = max(view.now_s, view.free_at_s)
        late_s = view.online_late_s - begins_s
        left_s = max(view.online_due_s - begins_s, min(late_s, self.pace.saving_s))
        beside_s = self._slo.beside_s(self._typical_prefill_s, online_s)
        beside_s *= self._ttft_margin.share
        arrival_s = max(beside_s, self._least_s(view.online_decoding))
        slack_s, late_s = min(left_s, gap_s), min(late_s, gap_s)
        if self._floor.owed_s:
            earned_s = online_s + self._floor.owed_s
            slack_s, late_s = max(slack_s, earned_s), max(late_s, earned_s)
            gap_s, arrival_s = max(gap_s, earned_s), max(arrival_s, earned_s)
        return _Step(online, online_s, slack_s, late_s, gap_s, arrival_s)

    def _idle_bound_s(self, view: StepView) -> float:
        allowance_s = self._slo.ttft_allowance_s(self._typical_prefill_s)
        rows = view.offline_decoding if view.offline_decoding.count else view.offline_parked
        least_s = self._least_s(rows)
        wanted_s = max(self._yield_s, least_s * _FLOOR_STEPS / _LEAST_STEPS)
        if allowance_s < inf:
            wanted_s = max(wanted_s, _IDLE_SHARE * allowance_s)
        return max(min(wanted_s, allowance_s), least_s)

    def _least_s(self, rows: Rows) -> float:
        one_row = StepWork(decode_rows=1, decode_context=rows.mean_context_tokens)
        return _LEAST_STEPS * self._times.upper_s(one_row)

    def _offline_s(self, view: StepView, step: _Step, rows: int, chunk: _Chunk) -> float:
        """What of the step is offline work's: its rows decode unless a chunk has it for itself."""
        chunk_s = chunk.each_s * chunk.tokens if chunk.tokens else 0.0
        if chunk.tokens and not chunk.rides:
            return chunk_s
        return chunk_s + self._times.predict_s(_decoding(view, step, rows)) - step.online_s

    # -------------------------------------------------------------- offline rows

    def _rows_that_fit(self, view: StepView, step: _Step) -> int:
        """Offline rows that may decode; `view.max_rows` when all that there are may."""
        decoding, parked = view.offline_decoding, view.offline_parked
        resident = decoding.count + parked.count
        if not resident:
            # None holds a row yet; the first to be admitted may decode as soon as they do.
            return view.max_rows
        context = (decoding.context_tokens + parked.context_tokens) // resident
        fit = self._most_rows(step, resident, context)
        if not view.online_present:
            fit = max(fit, 1)  # whatever the model says: nobody else would ever run
        if fit < decoding.count and self._may_stay(step, fit, decoding):
            fit = decoding.count
        keeps = decoding.count <= fit < resident
        if keeps and fit * _ROWS_KEPT_SHARE < decoding.count:
            return decoding.count
        return view.max_rows if fit == resident else fit

    def _may_stay(self, step: _Step, fit: int, decoding: Rows) -> bool:
        """Whether all rows that decode go on, although only `fit` of them do within the bound."""
        if fit < _ROWS_STAY_SHARE * decoding.count:
            return False
        all_of_them = _with_rows(step.online, decoding.count, decoding.mean_context_tokens)
        return self._times.upper_s(all_of_them) <= min(step.late_s, step.arrival_s)

    def _most_rows(self, step: _Step, at_most: int, context: int) -> int:
        """The most rows of `context` tokens, up to `at_most`, whose step stays in the bound."""
        low, high = 0, at_most
        while low < high:
            rows = (low + high + 1) // 2
            if self._times.upper_s(_with_rows(step.online, rows, context)) <= step.bound_s:
                low = rows
            else:
                high = rows - 1
        return low

    # ----------------------------------------------------------- offline prompts

    def _next_chunk(self, view: StepView, step: _Step, rows: int) -> _Chunk:
        """Offline prompt tokens of the step."""
        if not (view.offline_waiting or view.offline_chunk):
            self._fed_s = view.now_s
            return _Chunk()
        if view.online_arriving:
            return _Chunk()
        patient = view.now_s - self._fed_s < _PATIENCE_S
        chunk = self._chunk_that_fits(view, step, rows, patient=patient)
        if chunk.tokens:
            self._fed_s = view.now_s
        return chunk

    def _chunk_that_fits(self, view: StepView, step: _Step, rows: int, *, patient: bool) -> _Chunk:
        resident = view.offline_chunk.resident_tokens if view.offline_chunk else 0
        if not view.online_decoding.count:
            return self._alone(view, step, resident)
        base = _decoding(view, step, rows)
        slack_s = step.slack_s if patient else step.late_s
        best = self._cheaper(view, base, resident, slack_s, step.arrival_s)
        if best.tokens < self._smallest_chunk:
            return _Chunk()
        if patient and slack_s < _FULL_SHARE * step.gap_s:
            could = self._cheaper(view, base, resident, step.gap_s, step.arrival_s)
            if best.each_s > _DEAR * could.each_s:
                return _Chunk()
        return best

    def _cheaper(
        self, view: StepView, base: StepWork, resident: int, slack_s: float, arrival_s: float
    ) -> _Chunk:
        """Of a chunk that rides with the rows of `base` and one between two of their steps."""
        between = _Chunk()
        if view.rows_decoded:  # a gap holds one prefill at most, and the rows' own step
            budget_s = min(slack_s - self._times.upper_s(base), arrival_s)
            between = self._chunk(view, resident, budget_s, StepWork(), 0.0)
        if not view.can_mix:
            return between
        base_s = self._times.predict_s(base)
        riding = self._chunk(view, resident, min(slack_s, arrival_s), base, base_s)
        return riding if riding.each_s <= between.each_s else between

    def _chunk(
        self, view: StepView, resident: int, budget_s: float, base: StepWork, base_s: float
    ) -> _Chunk:
        tokens = self._times.prefill_tokens_within_s(budget_s, resident, base)
        tokens = min(tokens, view.chunk_tokens)
        if tokens <= 0:
            return _Chunk()
        # In the mean: the margins of the two kinds of step differ, and would count as a cost.
        took_s = self._times.predict_s(base.plus_prompt(tokens, resident)) - base_s
        return _Chunk(tokens, rides=base.decode_rows > 0, each_s=max(took_s, 0.0) / tokens)

    def _alone(self, view: StepView, step: _Step, resident: int) -> _Chunk:
        if view.interruptible:
            return _Chunk(view.chunk_tokens, in_slices=True)
        tokens = self._times.prefill_tokens_within_s(step.bound_s, resident, StepWork())
        return _Chunk(min(max(tokens, self._smallest_chunk), view.chunk_tokens))

    def _slice_s(self, view: StepView, step: _Step, rows: int) -> float:
        """Seconds for layer slices: between two decode steps, what their slack leaves. An arrival
        ends them at a layer boundary, so what it may wait says nothing here."""
        if view.online_prompts or view.online_arriving:
            return 0.0
        if not view.online_decoding.count:
            return inf
        if not view.rows_decoded:
            return 0.0
        decoding = min(rows, view.offline_decoding.count)
        base = _with_rows(step.online, decoding, view.offline_decoding.mean_context_tokens)
        return max(step.slack_s - self._times.upper_s(base), 0.0)

    # ------------------------------------------------------------------- the plan

    def _plan(
        self,
        view: StepView,
        step: _Step,
        *,
        rows: int,
        chunk: _Chunk = _Chunk(),  # noqa: B008  frozen
        bound: Bound | None = None,
    ) -> StepPlan:
        room = min(view.max_rows - view.offline_resident, view.free_rows, view.offline_waiting)
        room = min(room, chunk.tokens // self._smallest_chunk + 1)  # looking at one has its price
        # A request that is admitted while others sit out would only hold KV.
        admits = chunk.tokens > 0 and rows >= view.max_rows
        return StepPlan(
            offline_prefill_tokens=chunk.tokens,
            offline_admissions=max(room, 0) if admits else 0,
            offline_decode_rows=rows,
            kv_reserve_tokens=self._reserve.tokens(view),
            offline_slice_s=self._slice_s(view, step, rows),
            mix=chunk.rides,
            in_slices=chunk.in_slices,
            bound_s=step.bound_s,
            bound=bound or step.bound,
        )


def _follow(average: float, new: float, weight: float) -> float:
    """A moving average, which begins with its first value."""
    return average + weight * (new - average) if average else new


def _decode(rows: Rows) -> StepWork:
    return StepWork(decode_rows=rows.count, decode_context=rows.context_tokens)


def _decoding(view: StepView, step: _Step, rows: int) -> StepWork:
    """The online rows, and up to `rows` offline ones that decode or sit out."""
    offline = min(rows, view.offline_decoding.count + view.offline_parked.count)
    return _with_rows(step.online, offline, view.offline_decoding.mean_context_tokens)


def _with_rows(work: StepWork, rows: int, context: int) -> StepWork:
    return StepWork(
        decode_rows=work.decode_rows + rows,
        decode_context=work.decode_context + rows * context,
    )
