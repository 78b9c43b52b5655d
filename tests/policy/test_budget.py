"""Each rule of the slack budget, as rows of a table on a fake clock.

The latency model is linear: a step takes 30 ms, 1 ms a prompt token and 3 ms a row.
"""

from __future__ import annotations

from math import inf
from typing import Any, ClassVar

import msgspec
import pytest

from conserve_sgl.policy import OnlineReserve, Prompt, Rows, SlackBudget, StepPlan, StepView
from conserve_sgl.policy.slo import Factor, Seconds, Slo
from policy.simulator import LinearTimes

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


def due(in_s: float) -> dict[str, float]:
    """When the next online token is due in a step with offline work; 10 ms later in one without."""
    return {"offline_due_s": NOW + in_s, "online_due_s": NOW + in_s + 0.01}


def make_budget(
    *,
    slo: Slo = ABSOLUTE,
    yield_s: float = 0.1,
    margin: float = 1.0,
    reserve: float = 0.25,
) -> SlackBudget:
    return SlackBudget(
        LinearTimes(margin=margin),
        slo=slo,
        yield_s=yield_s,
        reserve=OnlineReserve(at_most=reserve),
        smallest_chunk=16,
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
    decoding = msgspec.structs.replace(VIEW, online_decoding=Rows(10, 100))
    assert budget.plan(decoding).bound_s == pytest.approx(0.06 * 1.5)


class TestWithoutOnline:
    def test_a_prefill_stays_within_the_yield_bound(self):
        assert plan().offline_prefill_tokens == 70  # 30 ms + 70 * 1 ms

    def test_the_bound_holds_for_the_upper_estimate(self):
        assert plan(margin=1.25).offline_prefill_tokens == 50

    def test_a_prefill_that_can_be_interrupted_is_a_whole_chunk(self):
        assert plan(interruptible=True).offline_prefill_tokens == 1024

    def test_rows_stay_within_the_yield_bound(self):
        granted = plan(offline_decoding=Rows(60, 6000)).offline_decode_rows
        assert granted == 23  # 30 ms + 23 * 3 ms

    def test_all_rows_decode_when_they_fit(self):
        assert plan(offline_decoding=Rows(20, 2000)).offline_decode_rows == VIEW.max_rows

    def test_a_step_may_take_twice_one_rows_step_whatever_the_bound(self):
        granted = plan(offline_decoding=Rows(60, 6000), yield_s=0.001).offline_decode_rows
        assert granted == 12  # 2 * 33 ms

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

    def test_offline_rows_first(self):
        granted = plan(**self.ROWS, offline_decoding=Rows(64, 6400), yield_s=0.1)
        assert granted.offline_decode_rows == 33  # within 39 + 100 ms
        assert granted.offline_prefill_tokens == 0

    def test_then_prompt_tokens_in_the_same_step(self):
        granted = plan(**self.ROWS, offline_decoding=Rows(10, 1000), yield_s=0.1)
        assert granted.offline_decode_rows == VIEW.max_rows
        assert (granted.offline_prefill_tokens, granted.mix) == (70, True)

    def test_the_earliest_deadline_bounds_the_step(self):
        rows = {**self.ROWS, **due(0.09)}
        assert plan(**rows).offline_prefill_tokens == 51
        assert plan(**rows, offline_decoding=Rows(64, 6400)).offline_decode_rows == 17

    def test_what_the_device_runs_now_is_waited_for(self):
        rows = {**self.ROWS, **due(0.09), "free_at_s": NOW + 0.02}
        assert plan(**rows).offline_prefill_tokens == 31

    def test_nothing_joins_a_late_row(self):
        rows = {**self.ROWS, **due(-1)}
        granted = plan(**rows, offline_decoding=Rows(5, 500), offline_parked=Rows(5, 500))
        assert (granted.offline_decode_rows, granted.offline_prefill_tokens) == (0, 0)

    def test_no_gap_is_planned_longer_than_twice_the_objective(self):
        rows = {**self.ROWS, **due(60)}
        assert plan(**rows, yield_s=10).bound_s == pytest.approx(0.4)

    def test_without_mixing_a_prefill_has_a_step_of_its_own_and_time_for_the_rows_after_it(self):
        granted = plan(**self.ROWS, can_mix=False, yield_s=1)
        assert granted.offline_prefill_tokens == 131  # 30 + 131 + 39 ms
        assert not granted.mix

    def test_without_mixing_a_prefill_never_follows_another(self):
        granted = plan(**self.ROWS, can_mix=False, rows_decoded=False)
        assert granted.offline_prefill_tokens == 0

    def test_relative_to_the_rows_alone(self):
        granted = plan(**self.ROWS, slo=RELATIVE, offline_decoding=Rows(64, 6400))
        assert granted.offline_decode_rows == 6  # within 1.5 * 39 ms

    def test_rows_that_decode_are_not_moved_for_a_small_gain(self):
        fits, decodes = 33, 31
        granted = plan(
            **self.ROWS, offline_decoding=Rows(decodes, 3100), offline_parked=Rows(33, 3300)
        )
        assert granted.offline_decode_rows == decodes < fits

    def test_nothing_is_admitted_while_others_sit_out(self):
        rows = {"offline_decoding": Rows(30, 3000), "offline_parked": Rows(20, 2000)}
        assert plan(**self.ROWS, **rows).offline_admissions == 0


class TestOnlinePrompts:
    PROMPT: ClassVar = {"online_prompts": (Prompt(800),)}
    ROWS: ClassVar = {"online_decoding": Rows(3, 300), **due(0.2)}

    def test_nothing_offline_starts(self):
        granted = plan(**self.PROMPT)
        assert granted.online_prefill_tokens == VIEW.chunk_tokens
        assert (granted.offline_prefill_tokens, granted.offline_admissions) == (0, 0)

    def test_a_short_prompt_is_not_cut(self):
        granted = plan(**self.ROWS, online_prompts=(Prompt(100),))
        assert (granted.online_prefill_tokens, granted.mix) == (VIEW.chunk_tokens, False)

    def test_a_long_prompt_shares_steps_with_the_rows_that_decode(self):
        granted = plan(**self.ROWS, **self.PROMPT)
        assert (granted.online_prefill_tokens, granted.mix) == (171, True)

    def test_offline_rows_sit_out_meanwhile(self):
        granted = plan(**self.ROWS, **self.PROMPT, offline_decoding=Rows(5, 500))
        assert granted.offline_decode_rows == 0

    def test_without_mixing_the_chunk_leaves_time_for_the_rows(self):
        granted = plan(**self.ROWS, **self.PROMPT, can_mix=False)
        assert (granted.online_prefill_tokens, granted.mix) == (141, False)

    def test_without_mixing_and_without_slack_chunks_and_rows_take_turns(self):
        late = {**self.ROWS, **due(0), "can_mix": False}
        assert plan(**late, **self.PROMPT).online_prefill_tokens == 16
        assert plan(**late, **self.PROMPT, rows_decoded=False).online_prefill_tokens == 0

    def test_a_relative_objective_leaves_online_to_itself(self):
        granted = plan(**self.ROWS, **self.PROMPT, slo=RELATIVE)
        assert (granted.online_prefill_tokens, granted.mix) == (VIEW.chunk_tokens, False)

    def test_offline_rows_may_decode_if_the_prompt_finds_no_kv(self):
        assert plan(**self.PROMPT, offline_decoding=Rows(5, 500)).offline_decode_rows > 0


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
        assert plan().offline_admissions == 50
        assert plan(free_rows=7).offline_admissions == 7
        assert plan(offline_decoding=Rows(10, 1000), max_rows=15).offline_admissions == 5
        assert plan(offline_waiting=3).offline_admissions == 3
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
        assert plan(rows_decoded=False, **rows).offline_slice_s == 0

    def test_late_online_rows_spare_nothing(self):
        late = plan(online_decoding=Rows(1, 100), offline_suspended=2, **due(0.01))
        assert late.offline_slice_s == 0
