"""The ring of the latest steps."""

from __future__ import annotations

import pytest

from conserve_sgl.policy import Bound
from conserve_sgl.status.record import Step
from conserve_sgl.status.steps import StepRing, steps_of


class Engine:
    """Forms and ends steps of a tenth of a second, each with its number as rows."""

    def __init__(self, kept: int = 8) -> None:
        self.ring = StepRing(kept)
        self.now_s = 100.0
        self.formed_steps = 0

    def form(self, *, bound: Bound = Bound.TPOT, arrivals: int = 0, **counts: int) -> None:
        known = dict.fromkeys(
            ("online_prompt_tokens", "offline_prompt_tokens", "offline_rows", "offline_parked"), 0
        )
        known |= {"preemptions": 0, "yields": 0, "online_rows": self.formed_steps, **counts}
        self.ring.formed(self.now_s, bound=bound, arrivals=arrivals, **known)
        self.formed_steps += 1

    def end(self, seconds: float = 0.1, *, sliced: bool = False) -> None:
        self.now_s += 0.1
        self.ring.ended(self.now_s, seconds, sliced=sliced)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.form()
            self.end()

    def read(self, since: int | None = None, most: int | None = None) -> list[Step]:
        first, packed = self.ring.read(since, most)
        return list(steps_of(first, packed, epoch_s=1000.0))


def test_a_step_is_what_was_written():
    engine = Engine()
    engine.form(
        online_prompt_tokens=1,
        online_rows=2,
        offline_prompt_tokens=3,
        offline_rows=4,
        offline_parked=5,
        bound=Bound.KV,
        arrivals=6,
        preemptions=7,
        yields=8,
    )
    engine.end(sliced=True)
    (step,) = engine.read()
    assert step == Step(0, pytest.approx(1100.0), 0.1, 0.0, 1, 2, 3, 4, 5, True, "kv", 6, 7, 8)


def test_events_count_since_the_step_before():
    engine = Engine()
    for arrivals in (2, 2, 5):
        engine.form(arrivals=arrivals)
        engine.end()
    assert [step.arrivals for step in engine.read()] == [2, 0, 3]


def test_a_step_is_there_once_it_has_ended():
    engine = Engine()
    engine.form()
    assert engine.read() == []
    engine.form()  # with overlap scheduling, one runs while the next is formed
    engine.end()
    assert [step.seq for step in engine.read()] == [0]
    assert engine.ring.ended_steps == 1


@pytest.mark.parametrize("steps", [0, 1, 7, 8, 9, 16, 27])
@pytest.mark.parametrize("in_flight", [0, 1, 2])
def test_the_latest_are_kept_in_order_without_gaps(steps, in_flight):
    engine = Engine()
    engine.run(steps)
    for _ in range(in_flight):
        engine.form()
    kept = engine.read()
    assert [step.seq for step in kept] == list(range(max(steps - 8 + in_flight, 0), steps))
    assert [step.online_rows for step in kept] == [step.seq for step in kept]


def test_what_is_asked_for_is_what_is_read():
    engine = Engine()
    engine.run(20)
    assert [step.seq for step in engine.read(since=17)] == [17, 18, 19]
    assert [step.seq for step in engine.read(since=3)] == list(range(12, 20))
    assert [step.seq for step in engine.read(most=2)] == [18, 19]
    assert [step.seq for step in engine.read(since=15, most=2)] == [18, 19]
    assert engine.read(most=0) == engine.read(since=20) == engine.read(since=10**15) == []


def test_idle_time_is_that_with_nothing_in_flight():
    engine = Engine()
    engine.run(1)
    engine.now_s += 3.0
    engine.form()
    engine.form()
    engine.end()
    engine.end()
    assert [step.idle_s for step in engine.read()] == pytest.approx([0.0, 3.0, 0.0])


def test_a_step_without_a_measured_time_lasts_from_the_end_of_the_one_before():
    engine = Engine()
    engine.form()
    engine.form()
    engine.end(0.0)
    engine.end(0.0)
    assert [step.seconds for step in engine.read()] == pytest.approx([0.1, 0.1])


def test_steps_that_are_forgotten_have_no_time():
    engine = Engine()
    engine.run(1)
    engine.form()
    engine.ring.forget()
    engine.end()  # nothing is in flight
    engine.run(1)
    assert [step.seconds for step in engine.read()] == [
        pytest.approx(0.1),
        None,
        pytest.approx(0.1),
    ]


def test_nothing_grows_in_the_ring():
    engine = Engine()
    size = len(engine.ring._buffer)
    engine.run(100)
    assert len(engine.ring._buffer) == size
