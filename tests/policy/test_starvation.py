"""Offline work that waits and gets nothing is noticed, and why."""

from __future__ import annotations

import pytest

from conserve_sgl.policy import Bound, Starvation


def said(starvation: Starvation, until_s: int, **step: bool) -> list[int]:
    """The seconds in which something was said, with a step a second."""
    steps = range(until_s + 1)
    return [at for at in steps if starvation.look(float(at), Bound.TPOT, **step) is not None]


def test_after_half_a_minute_and_twice_as_late_each_time():
    assert said(Starvation(), 250, waits=True, runs=False) == [30, 60, 120, 240]


@pytest.mark.parametrize("step", [{"waits": True, "runs": True}, {"waits": False, "runs": False}])
def test_nothing_is_said_where_it_runs_or_nothing_waits(step):
    assert said(Starvation(), 100, **step) == []


def test_one_step_with_offline_work_ends_it():
    starvation = Starvation()
    said(starvation, 29, waits=True, runs=False)
    assert starvation.seconds == 29
    assert starvation.look(30.0, Bound.TPOT, waits=True, runs=True) is None
    assert starvation.seconds == 0
    assert starvation.look(59.0, Bound.TPOT, waits=True, runs=False) is None


@pytest.mark.parametrize("bound", Bound)
def test_it_says_what_bound_held_and_what_it_would_take(bound):
    starvation = Starvation()
    starvation.look(0.0, bound, waits=True, runs=False)
    text = starvation.look(31.0, bound, waits=True, runs=False)
    assert text is not None
    assert "31 s" in text
    assert bound.remedy in text
