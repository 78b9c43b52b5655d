"""How long a refused client is asked to wait, on a clock of the test's."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from conserve_sgl.ingress.drain import Drain


def drained(*freed_s: float, shortest_s: int = 5) -> Drain:
    drain = Drain(shortest_s)
    for at_s in freed_s:
        drain.freed(at_s)
    return drain


def test_without_knowledge_the_wait_is_the_shortest():
    assert drained(shortest_s=7).wait_s(0.0) == 7


@pytest.mark.parametrize(
    ("freed_s", "now_s", "waits_s"),
    [
        pytest.param([0.0, 10.0, 20.0], 30.0, [10, 20, 30], id="a place each ten seconds"),
        pytest.param([29.5] * 100, 30.0, [5] * 10, id="fast: the shortest wait"),
        pytest.param([0.0], 25.0, [25, 50, 60, 60], id="slow: at most a minute"),
        pytest.param([0.0], 100.0, [5, 5], id="what is long ago counts no more"),
    ],
)
def test_each_refused_client_gets_the_time_of_a_place(freed_s, now_s, waits_s):
    drain = drained(*freed_s)
    assert [drain.wait_s(now_s) for _ in waits_s] == waits_s


def test_places_that_were_promised_pass_with_time():
    drain = drained(0.0, 10.0, 20.0)
    assert [drain.wait_s(30.0) for _ in range(3)] == [10, 20, 30]
    for at_s in (40.0, 50.0, 60.0):
        drain.freed(at_s)
    assert drain.wait_s(60.0) == 10


@given(
    st.integers(1, 1000),
    st.lists(st.tuples(st.floats(0, 100), st.booleans()), max_size=50),
)
@example(1, [(37.0, False), (100.0, True), (30.883126527402943, False), (29.0, False)])
def test_a_wait_is_never_outside_its_bounds(shortest_s, events):
    drain, now_s = Drain(shortest_s), 0.0
    for later_s, is_freed in events:
        now_s += later_s
        if is_freed:
            drain.freed(now_s)
        else:
            assert shortest_s <= drain.wait_s(now_s) <= max(60, shortest_s)
