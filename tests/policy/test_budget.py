"""Each rule of the slack budget, as rows of a table on a fake clock.

The latency model is linear: a step takes 30 ms, 1 ms a prompt token and 3 ms a row.
"""

from __future__ import annotations

from math import inf
from typing import Any, ClassVar

import msgspec
import pytest

from conserve_sgl.policy import (
    Bound,
    OnlineReserve,
    Prompt,
    Rows,
    SlackBudget,
    StepPlan,
    StepView,
    StepWork,
)
from conserve_sgl.policy.budget import StepTimes
from conserve_sgl.policy.slo import Factor, Seconds, Slo
from support.simulated import LinearTimes

ABSOLUTE = Slo(Seconds(1.0), Seconds(0.2))
RELATIVE = Slo(Factor(1.5), Factor(1.5))
NOW = 100.0

VIEW = StepView(
    now_s=NOW,
    offline_waiting=50,
    free_rows=100,
    max_rows=64,
    free_kv_tokens=100_000,
    total_kv_tokens=100_000,
    chunk_tokens=1024,
    can_mix=True,
)


def due(in_s: float, late_s: float | None = None) -> dict[str, float]:
    """When the next online token is due, and when it is with the reserve spent."""
    return {"online_due_s": NOW + in_s, "online_late_s": NOW + (in_s if late_s is None else late_s)}


class DearRows(LinearTimes):
    """Rows cost ten times as much in a step with a prompt."""

    def predict_s(self, work: StepWork) -> float:
        dear = 9 * self.row * work.decode_rows if work.prefill_tokens else 0.0
        return super().predict_s(work) + dear

    def prefill_tokens_within_s(self, budget_s: float, resident: int, base: StepWork) -> int:
        dear_s = 9 * self.row * base.decode_rows
        return super().prefill_tokens_within_s(budget_s - dear_s, resident, base)


def make_budget(
    *,
    slo: Slo = ABSOLUTE,
    yield_s: float = 0.1,
    margin: float = 1.0,
    reserve: float = 0.25,
    times: StepTimes | None = None,
    min_share: float = 0.0,
) -> SlackBudget:
    return SlackBudget(
        times or LinearTimes(margin=margin),
        slo=slo,
        yield_s=yield_s,
        reserve=OnlineReserve(at_most=reserve),
        smallest_chunk=16,
        min_share=min_share,
    )


def plan(
    *, slo: Slo = ABSOLUTE, yield_s: float = 0.1, margin: float = 1.0, **view: Any
) -> StepPlan:
    budget = make_budget(slo=slo, yield_s=yield_s, margin=margin)
    return budget.plan(msgspec.structs.replace(VIEW, **view))


def test_other_objectives_hold_from_the_next_plan():
    budget = make_budget()
    assert budget.plan(VIEW).offline_prefill_tokens == 70
    budget.aim_at(RELATIVE, yield_s=0.15)
    assert budget.plan(VIEW).offline_prefill_tokens == 120
    decoding = msgspec.structs.replace(VIEW, online_decoding=Rows(10, 100), **due(10))
    assert budget.plan(decoding).bound_s == pytest.approx(0.06 + 0.5 * 1.5 * 0.06)


class TestWithoutOnline:
    def test_a_prefill_stays_within_the_yield_bound(self):
        assert plan().offline_prefill_tokens == 70  # 30 ms + 70 * 1 ms

    def test_the_bound_holds_for_the_upper_estimate(self):
        assert plan(margin=1.25).offline_prefill_tokens == 50

    def test_a_prefill_that_can_be_interrupted_is_a_whole_chunk(self):
        granted = plan(interruptible=True)
        assert (granted.offline_prefill_tokens, granted.in_slices) == (1024, True)

    def test_a_tenth_of_an_absolute_ttft_is_allowed_whatever_the_yield_bound(self):
        slo = Slo(Seconds(2.0), Seconds(0.2))
        assert plan(slo=slo, yield_s=0.001).offline_prefill_tokens == 150  # 30 + 150 ms

    def test_rows_stay_within_the_yield_bound(self):
        granted = plan(offline_decoding=Rows(60, 6000)).offline_decode_rows
        assert granted == 23  # 30 ms + 23 * 3 ms

    def test_all_rows_decode_when_they_fit(self):
        assert plan(offline_decoding=Rows(20, 2000)).offline_decode_rows == VIEW.max_rows

    def test_a_step_may_take_twice_one_rows_step_whatever_the_bound(self):
        slo = Slo(Seconds(0.5), Seconds(0.2))
        rows = plan(slo=slo, offline_decoding=Rows(60, 6000), yield_s=0.001).offline_decode_rows
        assert rows == 12  # 2 * 33 ms

    @pytest.mark.parametrize("margin", [1.0, 2.5, 50.0])
    def test_a_row_always_moves_however_unsure_the_model_is(self, margin):
        granted = plan(offline_parked=Rows(8, 800), margin=margin, yield_s=0.001)
        assert granted.offline_decode_rows >= 1

    def test_a_prompt_always_moves(self):
        assert plan(yield_s=0.001, offline_chunk=Prompt(500)).offline_prefill_tokens >= 16

    def test_the_ttft_objective_bounds_the_step_too(self):
        # A typical prompt of 600 ms leaves 300 of the 900 that are planned with.
        budget = make_budget(yield_s=0.5, reserve=0.0)
        budget.plan(msgspec.structs.replace(VIEW, online_prompts=(Prompt(570),)))
        assert budget.plan(VIEW).offline_prefill_tokens == 270

    @pytest.mark.parametrize(
        ("prompt_tokens", "rows"),
        [
            (870, 12),  # 900 ms: 450 ms are left, and the yield bound is twice 33 ms
            (80, 8),  # 110 ms: 55 ms are left
            (20, 6),  # 50 ms: 25 ms are left, but half as much again as 33 ms is allowed
        ],
    )
    def test_a_relative_ttft_objective_bounds_it_below_twice_one_rows_step(
        self, prompt_tokens, rows
    ):
        budget = make_budget(slo=RELATIVE, yield_s=0.001, reserve=0.0)
        prompt = (Prompt(prompt_tokens),)
        budget.plan(msgspec.structs.replace(VIEW, online_prompts=prompt))
        offline = msgspec.structs.replace(VIEW, offline_decoding=Rows(60, 6000))
        assert budget.plan(offline).offline_decode_rows == rows


class TestBesideOnlineRows:
    """Three rows, whose step alone takes 39 ms."""

    ROWS: ClassVar = {"online_decoding": Rows(3, 300), **due(0.2)}

    def test_the_yield_bound_says_nothing(self):
        few, many = (
            plan(**self.ROWS, offline_decoding=Rows(64, 6400), yield_s=yield_s)
            for yield_s in (0.001, 1.0)
        )
        assert few.offline_decode_rows == many.offline_decode_rows == 53  # 30 + 3 * 56 <= 200 ms

    def test_offline_rows_first_then_prompts_by_the_cheaper_shape(self):
        granted = plan(**self.ROWS, offline_decoding=Rows(10, 1000), offline_waiting=9)
        assert granted.offline_decode_rows == VIEW.max_rows
        # 69 ms of rows: riding, 131 tokens cost 131 ms; alone they would cost 30 ms more.
        assert (granted.offline_prefill_tokens, granted.mix) == (131, True)

    def test_rows_that_are_dear_beside_a_prompt_get_a_step_of_their_own(self):
        """Triton's extend kernel spends a tile of queries on each of them."""
        times = DearRows()
        budget = make_budget(times=times)
        rows = {**self.ROWS, **due(0.4), "offline_decoding": Rows(10, 1000)}
        granted = budget.plan(msgspec.structs.replace(VIEW, **rows))
        assert not granted.mix
        assert granted.offline_prefill_tokens == 301  # 30 + 301 ms, and 69 for the rows after it
        assert not granted.in_slices

    def test_prompts_wait_for_slack_that_makes_them_cheap(self):
        """A step of its own costs 30 ms: 11 tokens in it are dear, 161 would not be."""
        rows = {**self.ROWS, "can_mix": False, "offline_decoding": Rows(10, 1000)}
        assert plan(**{**rows, **due(0.11)}).offline_prefill_tokens == 0
        assert plan(**{**rows, **due(0.4)}).offline_prefill_tokens == 301

    def test_the_earliest_deadline_bounds_the_step(self):
        rows = {**self.ROWS, **due(0.09)}
        assert plan(**rows, offline_decoding=Rows(64, 6400)).offline_decode_rows == 17

    def test_what_the_device_runs_now_is_waited_for(self):
        rows = {**self.ROWS, **due(0.09), "free_at_s": NOW + 0.03}
        assert plan(**rows, offline_decoding=Rows(64, 6400)).offline_decode_rows == 7

    def test_nothing_joins_a_late_row(self):
        rows = {**self.ROWS, **due(-1)}
        granted = plan(**rows, offline_decoding=Rows(5, 500), offline_parked=Rows(5, 500))
        assert (granted.offline_decode_rows, granted.offline_prefill_tokens) == (0, 0)

    def test_a_reserve_that_was_spent_is_filled_again_by_and_by(self):
        """Rows whose reserve online prompts took do not shut offline rows out; they slow down."""
        spent = {"online_decoding": Rows(3, 300), **due(-1, late_s=1)}
        budget = make_budget()
        rows = msgspec.structs.replace(VIEW, **spent, offline_decoding=Rows(64, 6400))
        budget.plan(rows)
        assert budget.plan(rows).bound_s == pytest.approx(0.039 + 0.35 * (0.2 - 0.039))

    def test_no_gap_is_planned_longer_than_twice_the_objective(self):
        assert plan(**{**self.ROWS, **due(60)}).bound_s == pytest.approx(0.4)

    def test_or_than_an_objective_of_its_own(self):
        slo = Slo(Seconds(1.0), Seconds(0.2), longest_gap=Seconds(0.1))
        assert plan(slo=slo, **{**self.ROWS, **due(60)}).bound_s == pytest.approx(0.1)

    def test_an_arrival_is_in_time_behind_two_such_steps(self):
        slo = Slo(Seconds(0.4), Seconds(5.0))
        assert plan(slo=slo, **{**self.ROWS, **due(60)}).bound_s == pytest.approx(0.18)

    def test_a_prefill_of_its_own_leaves_time_for_the_rows_after_it(self):
        granted = plan(**{**self.ROWS, **due(0.4)}, can_mix=False)
        assert granted.offline_prefill_tokens == 331  # 30 + 331 + 39 ms
        assert not granted.mix

    def test_a_prefill_of_its_own_never_follows_another(self):
        """However much slack there is: the longest gap has room for one."""
        rows = {**self.ROWS, **due(10), "can_mix": False}
        assert plan(**rows).offline_prefill_tokens > 0
        assert plan(**rows, rows_decoded=False).offline_prefill_tokens == 0

    def test_a_relative_objective_is_kept_over_a_request(self):
        """Not in every step: rows that were early leave more to offline work."""
        budget = make_budget(slo=Slo(Factor(20.0), Factor(1.5)))
        view = msgspec.structs.replace(VIEW, online_decoding=Rows(3, 300), offline_waiting=0)
        for _ in range(3):
            budget.plan(view)
        assert budget.pace.tpot_s == pytest.approx(1.5 * 0.039)
        early = msgspec.structs.replace(view, **due(0.1), offline_decoding=Rows(64, 6400))
        assert budget.plan(early).bound_s == pytest.approx(0.1)

    def test_rows_that_decode_are_not_moved_for_a_small_gain(self):
        fits, decodes = 53, 50
        granted = plan(
            **self.ROWS, offline_decoding=Rows(decodes, 5000), offline_parked=Rows(33, 3300)
        )
        assert granted.offline_decode_rows == decodes < fits

    @pytest.mark.parametrize(
        ("late_s", "decode", "rows"),
        [
            (1.0, 45, 64),  # 37 fit into 150 ms, 45 into 174
            (1.0, 60, 37),  # too few of them fit
            (0.16, 45, 37),  # online rows would be late
        ],
    )
    def test_rows_stay_where_most_of_them_fit_and_none_is_late(self, late_s, decode, rows):
        online = {"online_decoding": Rows(3, 300), **due(0.15, late_s)}
        granted = plan(**online, offline_decoding=Rows(decode, 100 * decode))
        assert granted.offline_decode_rows == rows

    def test_nothing_is_admitted_while_others_sit_out(self):
        rows = {"offline_decoding": Rows(40, 4000), "offline_parked": Rows(30, 3000)}
        assert plan(**self.ROWS, **rows).offline_admissions == 0


class TestOnlinePrompts:
    PROMPT: ClassVar = {"online_prompts": (Prompt(800),)}

    def test_nothing_offline_starts(self):
        granted = plan(**self.PROMPT)
        assert (granted.offline_prefill_tokens, granted.offline_admissions) == (0, 0)
        assert not granted.mix

    def test_offline_rows_may_decode_if_the_prompt_finds_no_kv(self):
        assert plan(**self.PROMPT, offline_decoding=Rows(5, 500)).offline_decode_rows > 0

    def test_what_they_take_from_rows_is_part_of_what_online_work_needs(self):
        """A relative objective is relative to online work alone, its own prompts included."""
        budget = make_budget(slo=RELATIVE)
        rows = msgspec.structs.replace(VIEW, online_decoding=Rows(3, 300), **due(1))
        budget.plan(msgspec.structs.replace(rows, **self.PROMPT))
        budget.plan(msgspec.structs.replace(rows, rows_decoded=False, offline_waiting=0))
        assert budget.pace.unloaded_s == pytest.approx(0.039 + 0.05 * 0.83)
        assert budget.pace.reserve_s == pytest.approx(budget.pace.tpot_s + 0.83)

    def test_a_prompt_that_waits_for_kv_takes_nothing(self):
        budget = make_budget(slo=RELATIVE)
        rows = msgspec.structs.replace(VIEW, online_decoding=Rows(3, 300), **due(1))
        for _ in range(5):
            budget.plan(msgspec.structs.replace(rows, **self.PROMPT))
        budget.plan(msgspec.structs.replace(rows, offline_waiting=0))
        assert budget.pace.unloaded_s == pytest.approx(0.039)


class TestArrivals:
    def test_nothing_offline_starts_while_an_arrival_is_tokenized(self):
        granted = plan(online_arriving=1, offline_decoding=Rows(5, 500))
        assert (granted.offline_prefill_tokens, granted.offline_decode_rows) == (0, 0)

    def test_beside_online_rows_offline_rows_go_on(self):
        granted = plan(
            online_arriving=1,
            online_decoding=Rows(3, 300),
            **due(0.2),
            offline_decoding=Rows(5, 500),
        )
        assert granted.offline_decode_rows > 0
        assert granted.offline_prefill_tokens == 0


class TestAdmission:
    def test_bounded_by_rows_and_by_what_waits(self):
        large = {"chunk_tokens": 1024, "interruptible": True}
        assert plan(**large).offline_admissions == 50
        assert plan(**large, free_rows=7).offline_admissions == 7
        assert plan(offline_decoding=Rows(10, 1000), max_rows=14).offline_admissions == 4
        assert plan(offline_waiting=3).offline_admissions == 3

    def test_no_more_are_tried_than_could_fill_the_chunk(self):
        assert plan(chunk_tokens=64).offline_admissions == 64 // 16 + 1
        assert plan(offline_decoding=Rows(20, 2000), max_rows=15).offline_admissions == 0

    def test_without_offline_work_nothing_is_granted(self):
        granted = plan(offline_waiting=0)
        assert (granted.offline_prefill_tokens, granted.offline_admissions) == (0, 0)


class TestSlices:
    def test_without_online_a_prefill_runs_until_something_arrives(self):
        assert plan(interruptible=True).offline_slice_s == inf
        assert plan(interruptible=True, offline_suspended=2).offline_slice_s == inf

    def test_a_suspended_prefill_lets_no_other_start(self):
        suspended = plan(interruptible=True, offline_suspended=2)
        assert (suspended.offline_prefill_tokens, suspended.offline_admissions) == (0, 0)

    @pytest.mark.parametrize("online", [{"online_arriving": 1}, {"online_prompts": (Prompt(10),)}])
    def test_online_prompts_hold_it(self, online):
        assert plan(offline_suspended=2, **online).offline_slice_s == 0

    def test_between_two_decode_steps_it_gets_what_the_online_rows_can_spare(self):
        rows = {"online_decoding": Rows(1, 100), "offline_suspended": 2, **due(0.1)}
        assert plan(**rows).offline_slice_s == pytest.approx(0.1 - 0.033)
        more = plan(**rows, offline_decoding=Rows(4, 400))
        assert more.offline_slice_s == pytest.approx(0.1 - 0.045)
        assert plan(rows_decoded=False, **rows).offline_slice_s == 0

    def test_late_online_rows_spare_nothing(self):
        late = plan(online_decoding=Rows(1, 100), offline_suspended=2, **due(0.01))
        assert late.offline_slice_s == 0


class TestBounds:
    """What a plan says bounds offline work: an operator reads it."""

    ROWS: ClassVar = {"online_decoding": Rows(3, 300)}

    @pytest.mark.parametrize(
        ("view", "bound"),
        [
            ({}, Bound.YIELD),
            ({"online_arriving": 1}, Bound.ARRIVAL),
            ({"online_prompts": (Prompt(10),)}, Bound.ONLINE_PROMPTS),
            ({**ROWS, **due(0.05)}, Bound.TPOT),
            ({**ROWS, **due(60)}, Bound.GAP),
            ({**ROWS, **due(60), "slo": Slo(Seconds(0.4), Seconds(5))}, Bound.TTFT),
        ],
    )
    def test_named(self, view, bound):
        assert plan(**view).bound is bound


class TestOutcomes:
    """What online requests got moves what offline work may use."""

    ROWS: ClassVar = {"online_decoding": Rows(3, 300), **due(60)}
    IN_TIME: ClassVar = {"ttft_s": 0.5, "tpot_s": 0.1}

    def test_a_late_answer_costs_time_to_spare(self):
        budget = make_budget()
        assert budget.pace.aim == 0.9
        budget.plan(msgspec.structs.replace(VIEW, **self.ROWS, offline_waiting=0))
        budget.online_ended(ttft_s=0.5, tpot_s=0.21)
        budget.plan(msgspec.structs.replace(VIEW, **self.ROWS, offline_waiting=0))
        assert budget.pace.aim == pytest.approx(0.85)

    def test_a_late_first_token_shortens_the_steps_that_an_arrival_may_meet(self):
        slo = Slo(Seconds(0.4), Seconds(5.0))
        budget = make_budget(slo=slo)
        view = msgspec.structs.replace(VIEW, **self.ROWS)
        assert budget.plan(view).bound_s == pytest.approx(0.18)
        budget.online_ended(ttft_s=0.41, tpot_s=None)
        assert budget.plan(view).bound_s == pytest.approx(0.95 * 0.18)

    def test_what_is_late_anyhow_leaves_something_to_offline_work(self):
        budget = make_budget()
        for _ in range(100):
            budget.online_ended(ttft_s=9.0, tpot_s=9.0)
        budget.plan(msgspec.structs.replace(VIEW, **self.ROWS, offline_waiting=0))
        assert budget.pace.aim == 0.5

    def test_requests_in_time_change_nothing(self):
        budget = make_budget()
        budget.plan(msgspec.structs.replace(VIEW, **self.ROWS, offline_waiting=0))
        before = budget.pace
        budget.online_ended(**self.IN_TIME)
        budget.plan(msgspec.structs.replace(VIEW, **self.ROWS, offline_waiting=0))
        assert budget.pace == before

    def test_a_relative_objective_is_not_judged_by_a_single_request(self):
        budget = make_budget(slo=RELATIVE)
        budget.plan(msgspec.structs.replace(VIEW, **self.ROWS, offline_waiting=0))
        budget.online_ended(ttft_s=9.0, tpot_s=9.0)
        budget.plan(msgspec.structs.replace(VIEW, **self.ROWS, offline_waiting=0))
        assert budget.pace.aim == 0.9

    def test_other_objectives_begin_anew(self):
        budget = make_budget()
        for _ in range(10):
            budget.online_ended(ttft_s=9.0, tpot_s=9.0)
        budget.aim_at(ABSOLUTE, yield_s=0.1)
        assert budget.pace.aim == 0.9


def test_late_requests_show_in_the_margins():
    budget = make_budget()
    before = budget.margins
    budget.online_ended(ttft_s=2.0, tpot_s=0.1)  # of objectives of 1 s and 0.2 s
    after = budget.margins
    assert after["ttft"] < before["ttft"]
    assert after["tpot"] == before["tpot"]


class TestLeastShare:
    """No slack for 200 steps of 0.1 s, and an objective that cannot be met."""

    def served_s(self, min_share: float) -> float:
        """Seconds of the steps that offline prompts got, of 1 ms a token."""
        budget = make_budget(min_share=min_share)
        tokens = 0
        for step in range(200):
            view = msgspec.structs.replace(VIEW, now_s=NOW + 0.1 * step, **self.at(0.1 * step))
            tokens += budget.plan(view).offline_prefill_tokens
        return tokens / 1000

    def at(self, s: float) -> dict[str, Any]:
        late = {"online_due_s": NOW + s - 1.0, "online_late_s": NOW + s - 1.0}
        return {"online_decoding": Rows(3, 300), **late}

    def test_without_it_nothing_runs_that_would_make_tokens_later(self):
        assert self.served_s(0.0) == 0.0

    @pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
    def test_offline_work_gets_its_share_of_the_time(self, share):
        assert self.served_s(share) == pytest.approx(share * 20.0, rel=0.2)

    def test_what_fits_the_slack_counts(self):
        budget = make_budget(min_share=0.1)
        plenty = msgspec.structs.replace(VIEW, online_decoding=Rows(3, 300), **due(10.0))
        for step in range(20):
            budget.plan(msgspec.structs.replace(plenty, now_s=NOW + 0.1 * step))
        late = msgspec.structs.replace(VIEW, now_s=NOW + 2.0, **self.at(2.0))
        assert budget.plan(late).offline_prefill_tokens == 0

    def test_nothing_is_earned_while_there_is_no_offline_work(self):
        budget = make_budget(min_share=0.5)
        none = msgspec.structs.replace(VIEW, offline_waiting=0, **self.at(0.0))
        for step in range(20):
            budget.plan(msgspec.structs.replace(none, now_s=NOW + 0.1 * step))
        late = msgspec.structs.replace(VIEW, now_s=NOW + 2.0, **self.at(2.0))
        assert budget.plan(late).offline_prefill_tokens == 0

    @pytest.mark.parametrize(
        ("can_mix", "cost_s"),
        [
            pytest.param(False, 0.03 + 0.2, id="a chunk alone: 30 ms and 200 tokens"),
            pytest.param(True, 0.2 + 20 * 0.003, id="a chunk that rides, and 20 rows"),
        ],
    )
    def test_a_step_costs_what_runs_in_it(self, can_mix, cost_s):
        budget = make_budget(min_share=0.5)
        late = msgspec.structs.replace(
            VIEW,
            can_mix=can_mix,
            chunk_tokens=200,
            offline_decoding=Rows(20, 2000),
            **self.at(0.0),
        )
        budget.plan(late)
        late = msgspec.structs.replace(late, now_s=NOW + 1.0)
        granted = budget.plan(late)
        assert (granted.offline_prefill_tokens, granted.mix) == (200, can_mix)
        left_s = 0.5 - cost_s  # half of the second was earned
        online_s = 0.03 + 3 * 0.003
        assert budget.plan(late).bound_s == pytest.approx(online_s + left_s)


class TestObjectivesAsTimes:
    def test_absolute_ones_are_what_they_say(self):
        budget = make_budget()
        assert budget.objectives_s == {"ttft": 1.0, "tpot": 0.2, "longest_gap": 0.4}

    def test_relative_ones_are_known_once_online_work_was_seen(self):
        budget = make_budget(slo=RELATIVE)
        assert budget.objectives_s == {"ttft": None, "tpot": None, "longest_gap": None}
        budget.plan(msgspec.structs.replace(VIEW, online_prompts=(Prompt(100),)))
        alone_s = LinearTimes().predict_s(StepWork.of([(100, 0)]))
        assert budget.objectives_s["ttft"] == pytest.approx(1.5 * alone_s)
        rows = {"online_decoding": Rows(4, 400), **due(1.0)}
        budget.plan(msgspec.structs.replace(VIEW, **rows))
        tpot_s = budget.objectives_s["tpot"]
        assert tpot_s == pytest.approx(1.5 * budget.pace.unloaded_s)
        assert budget.objectives_s["longest_gap"] == pytest.approx(max(2 * tpot_s, 0.05))
