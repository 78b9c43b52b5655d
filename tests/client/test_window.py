"""The window of one server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.client.window import Window


def test_until_the_first_refusal_every_answer_adds_one():
    window = Window(64, 8)
    for _ in range(8):
        window.answered(8, None)
    assert window.size == 16


def test_refusals_at_about_the_same_time_cut_it_once():
    window = Window(100, 100)
    for i in range(100):
        window.refused(100, 50 + i / 1000)
    assert window.size == 70
    window.refused(70, 51.5)
    assert window.size == 49


def test_what_is_cut_is_what_was_in_flight():
    window = Window(100, 100)
    window.refused(10, 50.0)
    assert window.size == 7


def test_it_grows_by_one_while_as_many_as_it_holds_are_answered():
    window = Window(100, 100)
    window.refused(20, 50.0)
    for _ in range(15):
        window.answered(14, None)
    assert window.size == 15


def test_a_server_that_would_take_more_gets_half_of_it_at_once():
    window = Window(100, 8)
    window.answered(8, 12)
    assert window.size == 14


def test_at_a_server_that_is_full_it_grows_by_one_a_round_so_that_a_second_job_gets_its_share():
    window = Window(100, 8)
    for _ in range(9):
        window.answered(8, 0)
    assert window.size == 9


def test_one_that_refuses_is_believed_when_it_would_take_nothing():
    window = Window(100, 20)
    window.refused(20, 50.0)
    window.answered(12, 0)
    assert window.size == 12
    window.answered(12, 6)
    assert window.size == 15


def test_it_is_never_larger_than_it_may_be_nor_shut():
    window = Window(8, 8)
    window.answered(8, 1000)
    assert window.size == 8
    for second in range(50):
        window.refused(1, float(second))
    assert window.size == 1


@given(
    st.integers(1, 1000),
    st.lists(
        st.tuples(st.integers(1, 1000), st.none() | st.integers(0, 10**6), st.booleans()),
        max_size=50,
    ),
)
def test_whatever_happens_one_fits_and_no_more_than_may(most, events):
    window = Window(most, most)
    for second, (in_flight, spare, refused) in enumerate(events):
        if refused:
            window.refused(in_flight, float(second))
        else:
            window.answered(in_flight, spare)
        assert 1 <= window.size <= most


@pytest.mark.parametrize("says", [True, False])
def test_two_clients_share_a_server_and_keep_its_rows_busy(says):
    """In rounds: each client sends what its window allows, what is beyond is refused."""
    rows, takes = 32, 36
    windows = [Window(256, 256), Window(256, 256)]
    idle_rows = refused = 0
    for second in range(200):
        sent = [w.size for w in windows]
        taken, left = [], takes
        for n in sent:
            taken.append(min(n, left))
            left -= taken[-1]
        for window, n, ok in zip(windows, sent, taken, strict=True):
            for _ in range(ok):
                window.answered(n, left if says else None)
            for _ in range(n - ok):
                window.refused(n, 2.0 * second)
        if second >= 100:
            idle_rows += max(rows - sum(taken), 0)
            refused += sum(sent) - sum(taken)
    assert idle_rows <= 0.2 * 100 * rows
    assert refused <= 0.1 * 100 * takes
