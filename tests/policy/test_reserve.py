"""The KV reserve follows the recent online demand."""

from __future__ import annotations

import pytest

from conserve_sgl.policy import OnlineReserve, Prompt, Rows, StepView

POOL = 10_000


def view(now_s: float, *, held: int = 0, wanted: int = 0, offline: int = 1) -> StepView:
    return StepView(
        now_s=now_s,
        online_decoding=Rows(1, held) if held else Rows(),
        online_prompts=(Prompt(wanted),) if wanted else (),
        offline_decoding=Rows(offline, 100 * offline),
        total_kv_tokens=POOL,
    )


@pytest.fixture
def reserve() -> OnlineReserve:
    return OnlineReserve(at_most=0.25)


def test_an_empty_engine_reserves_nothing(reserve):
    assert reserve.tokens(view(0.0, offline=0)) == 0


def test_a_little_is_kept_before_any_online_request_was_seen(reserve):
    assert reserve.tokens(view(0.0)) == 200


def test_the_peak_is_kept_less_what_is_held_now(reserve):
    reserve.tokens(view(0.0, held=500, wanted=1500))
    assert reserve.tokens(view(1.0, held=1000)) == pytest.approx(1000, rel=0.02)
    assert reserve.tokens(view(2.0)) == pytest.approx(2000, rel=0.02)


def test_the_peak_fades_by_half_in_two_minutes(reserve):
    reserve.tokens(view(0.0, held=2000))
    assert reserve.tokens(view(120.0)) == 1000
    assert reserve.tokens(view(240.0)) == 500


def test_the_operators_share_is_the_most(reserve):
    assert reserve.tokens(view(0.0, wanted=9000)) == 2500
    assert OnlineReserve(at_most=0.0).tokens(view(0.0, wanted=9000)) == 0
