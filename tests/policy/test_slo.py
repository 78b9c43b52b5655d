"""Objectives, absolute and relative, and the pace at which tokens are due."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.policy.slo import Factor, Pace, Seconds, Slo

ABSOLUTE = Slo(Seconds(1.0), Seconds(0.1))
RELATIVE = Slo(Factor(1.25), Factor(1.25))


def test_an_absolute_first_token_is_due_before_its_objective():
    assert ABSOLUTE.first_due_s(5.0) == pytest.approx(5.9)
    assert RELATIVE.first_due_s(5.0) == inf


def test_a_relative_objective_follows_what_online_work_takes_alone():
    assert ABSOLUTE.tpot_s(0.02) == 0.1
    assert RELATIVE.tpot_s(0.02) == pytest.approx(0.025)


def test_the_longest_gap_is_twice_the_objective_and_a_blink_at_least():
    assert ABSOLUTE.longest_gap_s(0.1) == pytest.approx(0.2)
    assert RELATIVE.longest_gap_s(0.01) == pytest.approx(0.05)


def test_the_longest_gap_is_an_objective_of_its_own():
    assert Slo(Seconds(1), Seconds(0.1), Seconds(0.12)).longest_gap_s(0.1) == 0.12
    assert Slo(Seconds(1), Seconds(0.1), Factor(3)).longest_gap_s(0.1) == pytest.approx(0.3)


class TestPace:
    def test_a_tenth_of_the_time_beyond_online_work_is_left(self):
        pace = Pace(tpot_s=0.1, unloaded_s=0.04)
        due_s, late_s = pace.next_due_s(6.0, 20)
        assert due_s == late_s == pytest.approx(6.0 + 20 * (0.04 + 0.9 * 0.06))

    def test_a_reserve_is_filled_before_it_is_kept(self):
        pace = Pace(tpot_s=0.1, unloaded_s=0.04, reserve_s=0.18)
        kept = [6.0 + 0.1 * n - pace.next_due_s(6.0, n)[0] for n in (1, 5, 10, 25, 50)]
        assert kept == pytest.approx([0.048, 0.18, 0.18, 0.18, 0.3])

    def test_tokens_that_come_at_once_are_due_when_the_last_of_them_is(self):
        pace = Pace(tpot_s=0.1, unloaded_s=0.04, reserve_s=0.5, step_tokens=3.0)
        one = Pace(tpot_s=0.1, unloaded_s=0.04, reserve_s=0.5)
        assert pace.next_due_s(6.0, 20) == one.next_due_s(6.0, 22)
        assert pace.saving_s == pytest.approx(3 * one.saving_s)

    def test_a_step_that_fills_it_again_takes_more_than_online_work_alone(self):
        pace = Pace(tpot_s=0.1, unloaded_s=0.04, reserve_s=0.18)
        assert pace.saving_s == pytest.approx(0.04 + 0.35 * 0.06)

    @given(
        tpot_s=st.floats(0, 10),
        unloaded_s=st.floats(0, 10),
        reserve_s=st.floats(0, 10),
        tokens=st.integers(1, 10_000),
    )
    def test_whatever_is_kept_online_work_alone_is_in_time(
        self, tpot_s, unloaded_s, reserve_s, tokens
    ):
        pace = Pace(tpot_s=tpot_s, unloaded_s=unloaded_s, reserve_s=reserve_s)
        due_s, late_s = pace.next_due_s(0.0, tokens)
        least_s = min(tpot_s, unloaded_s) * tokens
        assert least_s * (1 - 1e-9) <= due_s <= late_s <= tpot_s * tokens * (1 + 1e-9)


def test_how_long_an_arrival_may_wait():
    assert ABSOLUTE.ttft_allowance_s(0.3) == pytest.approx(0.6)
    assert ABSOLUTE.ttft_allowance_s(2.0) == 0
    assert RELATIVE.ttft_allowance_s(0.4) == pytest.approx(0.1)
    assert RELATIVE.ttft_allowance_s(0.0) == inf


def test_beside_online_rows_two_steps_share_what_an_absolute_objective_leaves():
    assert ABSOLUTE.beside_s(0.3, 0.02) == pytest.approx(0.3)
    assert ABSOLUTE.beside_s(2.0, 0.02) == 0


def test_beside_online_rows_a_relative_objective_adds_its_share_to_a_step():
    assert RELATIVE.beside_s(0.1, 0.02) == pytest.approx(0.02 + 0.25 * 0.13)


@pytest.mark.parametrize(
    ("objective", "value"),
    [
        (Seconds, 0.0),
        (Seconds, float("nan")),
        (Seconds, inf),
        (Factor, 0.99),
        (Factor, float("nan")),
        (Factor, inf),
    ],
)
def test_what_cannot_be_kept_is_refused(objective, value):
    with pytest.raises(ValueError, match="objective"):
        objective(value)
