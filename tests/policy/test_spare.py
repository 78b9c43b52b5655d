"""Spare capacity, look by look."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.policy.spare import Spare, SpareMeter


class Engine:
    """An engine that is looked at once a second."""

    def __init__(self, max_rows: int = 8) -> None:
        self.meter = SpareMeter()
        self.now_s = 100.0
        self.tokens = self.finished = 0
        self.max_rows = max_rows

    def look(
        self,
        *,
        waiting: int = 0,
        resident: int = 0,
        tokens: int = 0,
        finished: int = 0,
        held: bool = False,
    ) -> Spare:
        """A second later, in which so many tokens were served and so many requests answered."""
        self.now_s += 1.0
        self.tokens += tokens
        self.finished += finished
        return self.meter.look(
            self.now_s,
            tokens=self.tokens,
            finished=self.finished,
            waiting=waiting,
            resident=resident,
            max_rows=self.max_rows,
            held=held,
        )


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_an_idle_engine_takes_as_many_as_it_has_rows_and_a_few_that_wait(engine):
    assert engine.look() == Spare(requests=8 + 4)


def test_what_it_could_do_is_not_known_before_work_has_waited(engine):
    for _ in range(5):
        spare = engine.look(resident=2, tokens=50)
    assert spare.tokens_per_s is None
    assert spare.measured_s is None


def test_an_engine_with_work_that_waits_has_no_tokens_to_spare(engine):
    for _ in range(5):
        spare = engine.look(waiting=3, resident=8, tokens=100)
    assert spare.tokens_per_s == 0
    assert spare.measured_s == engine.now_s


def test_what_it_did_while_work_waited_is_what_it_can_do(engine):
    for _ in range(60):
        engine.look(waiting=3, resident=8, tokens=100)
    for _ in range(120):
        spare = engine.look(resident=1, tokens=20)
    assert spare.tokens_per_s == pytest.approx(80, rel=0.05)
    assert engine.now_s - spare.measured_s == 120


def test_so_many_may_wait_as_end_in_a_few_seconds(engine):
    for _ in range(120):
        spare = engine.look(waiting=5, resident=8, tokens=100, finished=10)
    assert spare.requests == 40 - 5


def test_rows_that_stay_free_while_requests_wait_invite_nobody(engine):
    assert engine.look(waiting=4, resident=1).requests == 0


def test_paused_offline_work_takes_nothing(engine):
    engine.look(waiting=3, resident=8, tokens=100)
    engine.look(waiting=3, resident=8, tokens=100)
    spare = engine.look(held=True)
    assert spare.requests == 0
    assert spare.tokens_per_s == 0


def test_a_pause_does_not_count_as_what_the_engine_can_do(engine):
    for _ in range(30):
        engine.look(waiting=3, resident=8, tokens=100)
    for _ in range(300):
        engine.look(waiting=3, held=True)
    spare = engine.look(waiting=3)
    assert spare.tokens_per_s == pytest.approx(100, rel=0.05)


def test_two_looks_at_the_same_time_are_one(engine):
    engine.look(waiting=3, tokens=100)
    engine.now_s -= 1.0
    assert engine.look(waiting=3).requests == 1


LOOKS = st.fixed_dictionaries(
    {
        "waiting": st.integers(0, 5000),
        "resident": st.integers(0, 500),
        "tokens": st.integers(0, 10**6),
        "finished": st.integers(0, 1000),
        "held": st.booleans(),
    }
)


@given(st.lists(LOOKS, min_size=1, max_size=30), st.integers(0, 256))
def test_it_is_never_less_than_nothing_nor_more_than_was_ever_seen(looks, max_rows):
    engine, most = Engine(max_rows), 0
    for look in looks:
        most = max(most, look["tokens"])
        spare = engine.look(**look)
        assert 0 <= spare.requests <= max_rows + 4 + 4 * 1000
        assert spare.tokens_per_s is None or 0 <= spare.tokens_per_s <= most
