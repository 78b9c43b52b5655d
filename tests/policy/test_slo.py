"""Deadlines of tokens, absolute and relative."""

from __future__ import annotations

from math import inf

import pytest

from conserve_sgl.policy import Rows, StepView
from conserve_sgl.policy.slo import Factor, Seconds, Slo

ABSOLUTE = Slo(Seconds(1.0), Seconds(0.1))
RELATIVE = Slo(Factor(1.25), Factor(1.25))
VIEW = StepView(now_s=10.0, online_decoding=Rows(2, 20), offline_due_s=10.08, online_due_s=10.1)


def test_offline_work_leaves_a_tenth_of_the_objective_to_spare():
    assert ABSOLUTE.first_due_s(5.0) == pytest.approx(5.9)
    assert ABSOLUTE.next_due_s(6.0, 20) == pytest.approx((7.8, 7.94))


def test_a_short_answer_survives_one_step_that_is_late_by_the_whole_objective():
    for tokens in range(1, 50):
        due_s, _ = ABSOLUTE.next_due_s(6.0, tokens)
        assert due_s + 0.1 <= 6.0 + 0.1 * tokens + 1e-9
    assert ABSOLUTE.next_due_s(6.0, 1) == pytest.approx((6.0, 6.097))


def test_a_request_whose_every_token_is_in_time_has_the_tpot_wherever_it_ends():
    first_s = 3.0
    for n in range(2, 50):
        last_s = max(ABSOLUTE.next_due_s(first_s, n - 1))
        assert (last_s - first_s) / (n - 1) <= 0.1


def test_relative_objectives_set_no_date():
    assert RELATIVE.first_due_s(5.0) == inf
    assert RELATIVE.next_due_s(5.0, 3) == (inf, inf)


def test_slack_runs_to_the_first_deadline_from_when_the_device_is_free():
    assert ABSOLUTE.slack_s(VIEW, 0.02) == pytest.approx(0.08)
    assert ABSOLUTE.slack_of_online_s(VIEW) == pytest.approx(0.1)
    late = StepView(
        now_s=10.0,
        free_at_s=10.05,
        online_decoding=Rows(2, 20),
        offline_due_s=10.08,
        online_due_s=10.1,
    )
    assert ABSOLUTE.slack_s(late, 0.02) == pytest.approx(0.03)


def test_relative_slack_follows_the_online_work():
    assert RELATIVE.slack_s(VIEW, 0.02) == pytest.approx(0.025)
    assert RELATIVE.slack_of_online_s(VIEW) == inf


def test_without_rows_there_is_no_deadline():
    assert ABSOLUTE.slack_s(StepView(now_s=0.0), 0.0) == inf


def test_how_long_an_arrival_may_wait():
    assert ABSOLUTE.ttft_allowance_s(0.3) == pytest.approx(0.6)
    assert ABSOLUTE.ttft_allowance_s(2.0) == 0
    assert RELATIVE.ttft_allowance_s(0.4) == pytest.approx(0.1)
    assert RELATIVE.ttft_allowance_s(0.0) == inf


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
