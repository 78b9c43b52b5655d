"""What is written down of a step, from what was counted for its plan."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from conserve_sgl.engine.step_recorder import StepRecorder
from conserve_sgl.policy import Bound, Rows, StepView
from conserve_sgl.status.record import Step
from conserve_sgl.status.steps import steps_of


class Engine:
    """A recorder, and the parts of an engine that it looks at."""

    def __init__(self) -> None:
        self.ledger = SimpleNamespace(
            tokens=Counter(computed=0), counts=Counter(offline_preempted=0)
        )
        self.slices = SimpleNamespace(count=0, suspensions=0, suspended=None)
        self.parked: list[object] = []
        self.inbox = SimpleNamespace(received=0)
        aside: Any = SimpleNamespace(slices=self.slices, parked=self.parked)
        self.recorder = StepRecorder(self.ledger, aside, self.inbox)
        self.now_s = 100.0

    def form(self, batch: object, *, online: int = 0, computed: int = 0) -> None:
        """SGLang formed `batch` while so many online rows decode; of its prompts so many tokens
        are offline."""
        self.ledger.tokens["computed"] += computed
        view = StepView(now_s=self.now_s, online_decoding=Rows(online, 100 * online))
        self.recorder.formed(self.now_s, batch, view, Bound.TPOT)

    def end(self) -> Step:
        """The step ends; what was written."""
        self.now_s += 0.1
        self.recorder.ended(self.now_s, 0.1)
        first, packed = self.recorder.ring.read(None, 1)
        (step,) = steps_of(first, packed, epoch_s=0.0)
        return step


def decode(rows: int) -> SimpleNamespace:
    return SimpleNamespace(
        reqs=[None] * rows, forward_mode=SimpleNamespace(is_extend=lambda: False)
    )


def prefill(tokens: int, riding: int = 0) -> SimpleNamespace:
    return SimpleNamespace(
        reqs=[None] * (1 + riding),
        decoding_reqs=[None] * riding or None,
        extend_num_tokens=tokens + riding,
        forward_mode=SimpleNamespace(is_extend=lambda: True),
    )


def work(step: Step) -> tuple[int, int, int, int]:
    return (
        step.online_prompt_tokens,
        step.online_rows,
        step.offline_prompt_tokens,
        step.offline_rows,
    )


@pytest.mark.parametrize(
    ("batch", "online", "computed", "expected"),
    [
        (decode(10), 4, 0, (0, 4, 0, 6)),
        (decode(3), 4, 0, (0, 3, 0, 0)),  # one of them ended in the step before
        (prefill(500), 4, 0, (500, 0, 0, 0)),
        (prefill(500), 0, 500, (0, 0, 500, 0)),
        (prefill(500, riding=6), 4, 200, (300, 4, 200, 2)),
        (prefill(5), 0, 9, (0, 0, 5, 0)),
    ],
)
def test_a_step_is_split_by_class(batch, online, computed, expected):
    engine = Engine()
    engine.form(batch, online=online, computed=computed)
    assert work(engine.end()) == expected


def test_a_prefill_that_goes_on_is_offline_whatever_was_counted_before():
    engine = Engine()
    batch = prefill(500)
    engine.form(batch, computed=500)
    engine.slices.count += 3
    engine.slices.suspended = batch
    engine.slices.suspensions += 1
    first = engine.end()
    engine.form(decode(2), online=2)
    between = engine.end()
    engine.form(batch)
    engine.slices.count += 1
    again = engine.end()
    assert [work(step) for step in (first, between, again)] == [
        (0, 0, 500, 0),
        (0, 2, 0, 0),
        (0, 0, 500, 0),
    ]
    assert [step.sliced for step in (first, between, again)] == [True, False, True]
    assert [step.yields for step in (first, between, again)] == [0, 1, 0]


def test_nothing_to_run_is_no_step_and_time_without_one_is_idle():
    engine = Engine()
    engine.form(decode(1))
    engine.end()
    engine.form(None)
    engine.now_s += 5.0
    engine.form(decode(1))
    step = engine.end()
    assert (step.seq, step.idle_s) == (1, pytest.approx(5.0))


def test_what_happened_since_is_counted():
    engine = Engine()
    engine.ledger.counts["offline_preempted"] += 2
    engine.inbox.received += 3
    engine.parked += [object(), object()]
    engine.form(decode(1))
    step = engine.end()
    assert (step.preemptions, step.arrivals, step.offline_parked) == (2, 3, 2)
    engine.form(decode(1))
    step = engine.end()
    assert (step.preemptions, step.arrivals) == (0, 0)


def test_a_rank_that_hears_of_no_arrivals_counts_none():
    engine = Engine()
    engine.recorder._inbox = None
    engine.form(decode(1))
    assert engine.end().arrivals == 0
