"""The records of the boundary between deciding and acting."""

from __future__ import annotations

import msgspec
import pytest

from conserve_sgl.policy import Prompt, Rows, StepPlan, StepView

NOTHING = {
    "offline_prefill_tokens": 0,
    "offline_admissions": 0,
    "offline_decode_rows": 0,
    "kv_reserve_tokens": 0,
}


def test_a_plan_may_grant_nothing():
    assert StepPlan(**NOTHING).offline_prefill_tokens == 0


@pytest.mark.parametrize("field", NOTHING)
def test_a_plan_refuses_a_negative_number(field):
    with pytest.raises(ValueError, match=f"{field}=-1"):
        StepPlan(**{**NOTHING, field: -1})


@pytest.mark.parametrize("field", NOTHING)
def test_a_plan_leaves_no_limit_open(field):
    given = {name: 0 for name in NOTHING if name != field}
    with pytest.raises(TypeError, match=field):
        StepPlan(**given)


@pytest.mark.parametrize(
    "record", [StepView(now_s=0.0), StepPlan(**NOTHING)], ids=["the view", "the plan"]
)
def test_is_frozen(record):
    with pytest.raises(AttributeError, match="immutable"):
        setattr(record, record.__struct_fields__[0], 1)


@pytest.mark.parametrize(
    "where",
    [
        {"online_arriving": 1},
        {"online_prompts": (Prompt(9),)},
        {"online_decoding": Rows(1, 9)},
    ],
    ids=lambda where: next(iter(where)),
)
def test_online_is_present_wherever_one_request_is(where):
    assert StepView(now_s=0.0, **where).online_present


def test_online_is_absent_however_much_offline_work_there_is():
    view = StepView(
        now_s=0.0,
        offline_waiting=9,
        offline_chunk=Prompt(9),
        offline_decoding=Rows(9, 90),
        offline_parked=Rows(9, 90),
        free_rows=9,
        free_kv_tokens=9,
    )
    assert not view.online_present


def test_a_resident_is_an_offline_request_that_holds_a_row():
    view = StepView(
        now_s=0.0,
        offline_waiting=100,
        offline_chunk=Prompt(9),
        offline_decoding=Rows(4, 40),
        offline_parked=Rows(2, 20),
    )
    assert view.offline_resident == 7


def test_a_view_can_be_copied_with_a_change():
    view = StepView(now_s=1.0, free_rows=3)
    assert msgspec.structs.replace(view, now_s=2.0) == StepView(now_s=2.0, free_rows=3)


def test_rows_know_their_mean_context():
    assert Rows(4, 42).mean_context_tokens == 10
    assert Rows().mean_context_tokens == 0
