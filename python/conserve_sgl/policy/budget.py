"""The latency-aware budget: offline work takes the slack that online deadlines leave.

The next token of every online request has a deadline (`TokenClock`). The slack of a step is the
earliest of them minus the time at which the step can begin. Offline work joins a step as long as
the step, by the latency model's upper estimate, stays within

    bound = min(slack, predicted time of the online work alone + yield bound)

so it neither makes an online token late nor keeps an arrival waiting for longer than the yield
bound. What fits is taken in the order of what it costs online: decode rows, then prompt tokens
that ride in the same step, and an offline prefill of its own only where nothing decodes for it to
ride with.

    online prompts wait      they go first, and alone with the online rows that decode; their
                             chunks are cut to the slack of those rows
    online rows decode       offline rows join them, then offline prompt tokens
    an arrival is announced  nothing offline starts until it is here
    no online request        offline alone, each step within the yield bound

Online goes first even against itself: a long online prompt is computed in chunks that leave the
rows that decode their deadlines, sharing steps with them where the engine can.
"""

from __future__ import annotations

from math import inf
from typing import Protocol

import msgspec

from conserve_sgl.policy.latency import StepWork
from conserve_sgl.policy.memory import OnlineReserve
from conserve_sgl.policy.slo import Slo
from conserve_sgl.policy.step import Prompt, Rows, StepPlan, StepView

__all__ = ["SlackBudget", "StepTimes"]

_ROWS_KEPT_SHARE = 0.9
"""Offline rows beyond what decodes now come back only when they are at least a tenth more: moving
rows in and out of the batch costs, and the slack of two steps is never quite the same."""

_FLOOR_STEPS = 2.0
"""An offline step may take twice the time of one row's step whatever `yield_s` says: below that
there is little left to bound, and offline work would run at small batches."""

_LEAST_STEPS = 1.5
"""And half as much again as one row's step whatever the time to first token allows: offline work
would else run at batch size one."""


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
    """What is the same for all decisions of one step."""

    online: StepWork
    online_s: float
    slack_s: float
    bound_s: float


class SlackBudget:
    """See the module's text. Keeps the recent online demand; `plan` changes nothing else.

    Args:
        times: the latency model; may be refitted between two plans.
        slo: the online objectives.
        yield_s: how long an arrival may have to wait for offline work that cannot be interrupted.
        reserve: sizes the KV that offline admissions leave free.
        smallest_chunk: prompt tokens below which a chunk is not worth a step: the step's constant
            cost would outweigh it. Also what an online prompt gets in the worst case, so that it
            always moves; hence at least a page.
    """

    def __init__(
        self,
        times: StepTimes,
        *,
        slo: Slo,
        yield_s: float,
        reserve: OnlineReserve,
        smallest_chunk: int,
    ) -> None:
        self._times = times
        self._slo = slo
        self._yield_s = yield_s
        self._reserve = reserve
        self._smallest_chunk = smallest_chunk
        self._typical_prefill_s = 0.0

    def aim_at(self, slo: Slo, *, yield_s: float) -> None:
        """Plan for other objectives from here on; what was learnt of the demand stays."""
        self._slo, self._yield_s = slo, yield_s

    def plan(self, view: StepView) -> StepPlan:
        """See `Policy.plan`."""
        step = self._measure(view)
        if view.online_prompts:
            self._remember_prefill(view.online_prompts[0])
            return self._online_prefill(view, step)
        if view.online_arriving and not view.online_decoding.count:
            return self._plan(view, step, rows=0, prefill=0)
        rows = self._rows_that_fit(view, step)
        prefill = 0 if view.offline_suspended else self._prefill_that_fits(view, step, rows)
        return self._plan(view, step, rows=rows, prefill=prefill)

    # ------------------------------------------------------------ the step's bound

    def _measure(self, view: StepView) -> _Step:
        online = _decode(view.online_decoding)
        online_s = self._times.upper_s(online) if view.online_decoding.count else 0.0
        slack_s = self._slo.slack_s(view, online_s)
        return _Step(online, online_s, slack_s, min(slack_s, online_s + self._yield_bound_s(view)))

    def _yield_bound_s(self, view: StepView) -> float:
        allowance_s = self._slo.ttft_allowance_s(self._typical_prefill_s)
        if view.online_decoding.count:
            return min(self._yield_s, allowance_s)
        rows = view.offline_decoding if view.offline_decoding.count else view.offline_parked
        one_row = StepWork(decode_rows=1, decode_context=rows.mean_context_tokens)
        row_s = self._times.upper_s(one_row)
        wanted_s = max(self._yield_s, _FLOOR_STEPS * row_s)
        return max(min(wanted_s, allowance_s), _LEAST_STEPS * row_s)

    def _remember_prefill(self, prompt: Prompt) -> None:
        """Follow how long an online prompt takes alone: what a relative TTFT is relative to."""
        took_s = self._times.predict_s(StepWork.of([(prompt.new_tokens, prompt.resident_tokens)]))
        if self._typical_prefill_s:
            took_s = self._typical_prefill_s + 0.1 * (took_s - self._typical_prefill_s)
        self._typical_prefill_s = took_s

    # ------------------------------------------------------------- online prompts

    def _online_prefill(self, view: StepView, step: _Step) -> StepPlan:
        """Online prompts run, within the slack of the online rows that decode."""
        if not view.online_decoding.count:
            # Rows matter only if the prompts find no KV, and the step decodes after all.
            return self._plan(view, step, rows=self._rows_that_fit(view, step), prefill=0)
        tokens, mix = self._online_chunk(view, step)
        return self._plan(view, step, rows=0, prefill=0, online_prefill=tokens, mix=mix)

    def _online_chunk(self, view: StepView, step: _Step) -> tuple[int, bool]:
        """The tokens of the next online chunk, and whether the rows decode in the same step."""
        wanted = min(sum(p.new_tokens for p in view.online_prompts), view.chunk_tokens)
        resident = view.online_prompts[0].resident_tokens
        slack_s = self._slo.slack_of_online_s(view)
        if slack_s == inf:
            return view.chunk_tokens, False
        fits = self._times.prefill_tokens_within_s(slack_s - step.online_s, resident, StepWork())
        if fits >= wanted:
            return view.chunk_tokens, False
        if view.can_mix:
            beside = self._times.prefill_tokens_within_s(slack_s, resident, step.online)
            return min(max(beside, self._smallest_chunk), view.chunk_tokens), True
        if fits < self._smallest_chunk and not view.rows_decoded:
            return 0, False  # the rows waited for the last chunk; now it waits for them
        return min(max(fits, self._smallest_chunk), view.chunk_tokens), False

    # -------------------------------------------------------------- offline work

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
        keeps = decoding.count <= fit < resident
        if keeps and fit * _ROWS_KEPT_SHARE < decoding.count:
            return decoding.count
        return view.max_rows if fit == resident else fit

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

    def _prefill_that_fits(self, view: StepView, step: _Step, rows: int) -> int:
        """Offline prompt tokens of the step."""
        if view.online_arriving or not (view.offline_waiting or view.offline_chunk):
            return 0
        resident = view.offline_chunk.resident_tokens if view.offline_chunk else 0
        if not view.online_decoding.count:
            return self._prefill_alone(view, step, resident)
        if view.can_mix:
            decoding = min(rows, view.offline_decoding.count + view.offline_parked.count)
            context = view.offline_decoding.mean_context_tokens
            base = _with_rows(step.online, decoding, context)
            tokens = self._times.prefill_tokens_within_s(step.bound_s, resident, base)
        else:
            # The prefill has a step of its own; the online rows decode after it, in time.
            if not view.rows_decoded:
                return 0
            budget_s = min(step.slack_s - step.online_s, self._yield_bound_s(view))
            tokens = self._times.prefill_tokens_within_s(budget_s, resident, StepWork())
        tokens = min(tokens, view.chunk_tokens)
        return tokens if tokens >= self._smallest_chunk else 0

    def _prefill_alone(self, view: StepView, step: _Step, resident: int) -> int:
        if view.interruptible:
            return view.chunk_tokens
        tokens = self._times.prefill_tokens_within_s(step.bound_s, resident, StepWork())
        return min(max(tokens, self._smallest_chunk), view.chunk_tokens)

    def _slice_s(self, view: StepView, step: _Step) -> float:
        """Seconds for layer slices: between two decode steps of online rows, what their slack
        leaves. An arrival ends them at a layer boundary, so the yield bound says nothing here."""
        if view.online_prompts or view.online_arriving:
            return 0.0
        if not view.online_decoding.count:
            return inf
        return max(step.slack_s - step.online_s, 0.0) if view.rows_decoded else 0.0

    # ------------------------------------------------------------------- the plan

    def _plan(
        self,
        view: StepView,
        step: _Step,
        *,
        rows: int,
        prefill: int,
        online_prefill: int | None = None,
        mix: bool | None = None,
    ) -> StepPlan:
        room = min(view.max_rows - view.offline_resident, view.free_rows, view.offline_waiting)
        # A request that is admitted while others sit out would only hold KV.
        admits = prefill > 0 and rows >= view.max_rows
        return StepPlan(
            online_prefill_tokens=view.chunk_tokens if online_prefill is None else online_prefill,
            offline_prefill_tokens=prefill,
            offline_admissions=max(room, 0) if admits else 0,
            offline_decode_rows=rows,
            kv_reserve_tokens=self._reserve.tokens(view),
            offline_slice_s=self._slice_s(view, step),
            mix=bool(prefill and view.can_mix and view.online_decoding.count)
            if mix is None
            else mix,
            bound_s=step.bound_s,
        )


def _decode(rows: Rows) -> StepWork:
    return StepWork(decode_rows=rows.count, decode_context=rows.context_tokens)


def _with_rows(work: StepWork, rows: int, context: int) -> StepWork:
    return StepWork(
        decode_rows=work.decode_rows + rows,
        decode_context=work.decode_context + rows * context,
    )
