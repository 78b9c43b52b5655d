"""What bounds offline work in a step, and for how long each bound held."""

from __future__ import annotations

import pytest

from conserve_sgl.policy import Bound, Prompt, Rows, StepPlan, StepView
from conserve_sgl.policy.bound import BoundSeconds, bound_of

ONLINE = {"online_decoding": Rows(4, 400)}
RUN = {"offline_decoding": Rows(10, 1000)}
WAIT = {"offline_waiting": 5}


def found(
    *,
    bound: Bound = Bound.TPOT,
    rows: int = 16,
    tokens: int = 512,
    kv: bool = False,
    adapters: bool = False,
    **view,
):
    """Of a step with so many rows and prompt tokens granted."""
    known = {"now_s": 0.0, "max_rows": 16, "free_rows": 20, "chunk_tokens": 512, **view}
    plan = StepPlan(
        offline_prefill_tokens=tokens,
        offline_admissions=0,
        offline_decode_rows=rows,
        kv_reserve_tokens=0,
        bound=bound,
    )
    return bound_of(StepView(**known), plan, short_of_kv=kv, short_of_adapters=adapters)


def test_work_that_is_not_there_is_bounded_by_nothing_whatever_the_plan_says():
    assert found(**ONLINE) is Bound.NOTHING
    assert found(**ONLINE, **RUN) is Bound.NOTHING  # all of it decodes, and nothing waits


@pytest.mark.parametrize("bound", [Bound.TPOT, Bound.TTFT, Bound.GAP, Bound.YIELD])
def test_the_time_of_the_step_bounds_rows_that_sit_out_and_prompts_that_are_cut(bound):
    assert found(bound=bound, rows=6, **ONLINE, **RUN) is bound
    assert found(bound=bound, tokens=300, **ONLINE, **WAIT) is bound
    assert found(bound=bound, tokens=0, **ONLINE, **RUN, **WAIT) is bound
    rest = {"offline_chunk": Prompt(900, 100)}
    assert found(bound=bound, tokens=0, free_rows=0, **ONLINE, **rest) is bound


@pytest.mark.parametrize("bound", [Bound.ONLINE_PROMPTS, Bound.ARRIVAL])
def test_who_goes_first_bounds_all_of_it(bound):
    assert found(bound=bound, free_rows=0, kv=True, **WAIT) is bound
    assert found(bound=bound, **RUN) is bound


@pytest.mark.parametrize("full", [{"free_rows": 0}, {"max_rows": 10}])
def test_rows_bound_what_waits_where_none_is_free(full):
    assert found(kv=True, **ONLINE, **RUN, **WAIT, **full) is Bound.ROWS


def test_kv_bounds_it_where_a_prompt_found_none():
    assert found(kv=True, **ONLINE, **RUN, **WAIT) is Bound.KV


def test_adapters_bound_it_where_a_batch_has_no_place_for_them():
    assert found(kv=True, adapters=True, **ONLINE, **WAIT) is Bound.ADAPTERS


def test_the_device_bounds_it_where_the_plan_grants_a_whole_step():
    assert found(**RUN, **WAIT) is Bound.DEVICE


def test_a_suspended_prefill_waits_for_online_work_or_is_what_runs():
    held = {"offline_suspended": 1}
    assert found(tokens=0, **ONLINE, **held) is Bound.TPOT
    assert found(tokens=0, bound=Bound.YIELD, **held) is Bound.DEVICE


def test_an_operator_s_word_stands_above_all():
    view = StepView(now_s=0.0, online_prompts=(Prompt(10),))
    plan = StepPlan(
        offline_prefill_tokens=0, offline_admissions=0, offline_decode_rows=0, kv_reserve_tokens=0
    )
    assert bound_of(view, plan, held=True, short_of_kv=True) is Bound.PAUSED
    assert bound_of(view, plan, held=True, ends=True, short_of_kv=True) is Bound.ENDING


# --------------------------------------------------------------------- for how long


def held(*steps: tuple[float, Bound]) -> BoundSeconds:
    seconds = BoundSeconds()
    for now_s, bound in steps:
        seconds.look(now_s, bound)
    return seconds


def test_a_bound_holds_until_the_next_step():
    seconds = held((100.0, Bound.TPOT), (102.0, Bound.KV), (103.0, Bound.TPOT))
    assert seconds.recent(107.0) == {Bound.TPOT: 6.0, Bound.KV: 1.0}
    assert seconds.total[Bound.TPOT] == 2.0  # as of the last step
    assert seconds.longest(107.0) is Bound.TPOT


def test_what_was_more_than_twenty_seconds_ago_is_not_of_late():
    steps = [(float(at), Bound.KV if at < 30 else Bound.ROWS) for at in range(60)]
    recent = held(*steps).recent(59.5)
    assert set(recent) == {Bound.ROWS}
    assert 10 <= recent[Bound.ROWS] <= 20


def test_rest_holds_at_once_and_is_forgotten_at_once():
    steps = [(float(at), Bound.TPOT) for at in range(9)]
    assert held(*steps, (9.0, Bound.PAUSED)).longest(9.1) is Bound.PAUSED
    resting = [(float(at), Bound.NOTHING) for at in range(9)]
    assert held(*resting, (9.0, Bound.ROWS)).longest(9.1) is Bound.ROWS


def test_an_engine_that_slept_does_not_count_for_more_than_a_window():
    seconds = held((0.0, Bound.NOTHING), (5000.0, Bound.TPOT))
    assert seconds.total[Bound.NOTHING] == 5000
    assert sum(seconds.recent(5001.0).values()) <= 20


def test_before_the_first_step_nothing_waits():
    assert BoundSeconds().longest(1.0) is Bound.NOTHING
    assert BoundSeconds().recent(1.0) == {}
