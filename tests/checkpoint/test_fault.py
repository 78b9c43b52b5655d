"""The switch that preempts at random in tests."""

from __future__ import annotations

import pytest

from conserve_sgl.checkpoint.fault import PREEMPT_ENV, RandomPreemption
from conserve_sgl.errors import ConserveError


def test_without_the_variable_nothing_is_preempted(monkeypatch):
    monkeypatch.delenv(PREEMPT_ENV, raising=False)
    assert RandomPreemption.from_environment() is None


def test_the_same_seed_picks_the_same_victims(monkeypatch):
    monkeypatch.setenv(PREEMPT_ENV, "3:0.5")
    picks = [RandomPreemption.from_environment().victims(range(100)) for _ in range(2)]
    assert picks[0] == picks[1]
    assert 30 < len(picks[0]) < 70


@pytest.mark.parametrize("text", ["0.5", "a:0.5", "1:often", "1:1.5", "1:-1", "1:2:3"])
def test_what_cannot_be_read_is_refused(monkeypatch, text):
    monkeypatch.setenv(PREEMPT_ENV, text)
    with pytest.raises(ConserveError, match=PREEMPT_ENV):
        RandomPreemption.from_environment()
