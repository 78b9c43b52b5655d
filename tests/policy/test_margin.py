"""Outcomes move the margin."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.policy.margin import Margin


def test_it_begins_at_its_most_and_requests_in_time_leave_it_there():
    margin = Margin(most=0.9, least=0.5)
    for _ in range(100):
        margin.saw(late=False)
    assert margin.share == 0.9


def test_a_late_request_costs_as_much_as_99_in_time_give_back():
    margin = Margin(most=0.9, least=0.5)
    margin.saw(late=True)
    assert margin.share == pytest.approx(0.85)
    for _ in range(98):
        margin.saw(late=False)
    assert margin.share < 0.9
    margin.saw(late=False)
    assert margin.share == pytest.approx(0.9)


@given(outcomes=st.lists(st.booleans(), max_size=300))
def test_it_stays_within_its_ends(outcomes):
    margin = Margin(most=0.9, least=0.5)
    for late in outcomes:
        margin.saw(late=late)
        assert 0.5 <= margin.share <= 0.9


def test_it_settles_where_one_in_a_hundred_is_late():
    """A world in which the share of late requests grows with the margin: 0 at 0.6, 10% at 0.9."""
    chance, margin = random.Random(0), Margin(most=0.9, least=0.5)
    shares = []
    for _ in range(20_000):
        margin.saw(late=chance.random() < (margin.share - 0.6) / 3)
        shares.append(margin.share)
    assert sum(shares[5000:]) / 15_000 == pytest.approx(0.63, abs=0.04)
