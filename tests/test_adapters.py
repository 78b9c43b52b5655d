"""Which adapters may be in the engine: online ones first, and never more than a batch holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.engine.adapters import Adapters, OnlineDrainer

LIMIT = 2


@dataclass(eq=False)
class FakeReq:
    lora_id: str | None
    offline: bool = True
    over: bool = False
    beam_group: Any = None

    def finished(self) -> bool:
        return self.over


def online(*adapters: str | None) -> list[FakeReq]:
    return [FakeReq(adapter, offline=False) for adapter in adapters]


def offline(*adapters: str | None) -> list[FakeReq]:
    return [FakeReq(adapter) for adapter in adapters]


def is_offline(req: FakeReq) -> bool:
    return req.offline


@dataclass
class Batch:
    reqs: list[FakeReq]
    batch_is_full: bool = True


@dataclass
class Engine:
    """A scheduler with what is put aside in it, and a memory that notes who gave way."""

    running: list[FakeReq] = field(default_factory=list)
    parked: list[FakeReq] = field(default_factory=list)
    suspended_reqs: list[FakeReq] = field(default_factory=list)
    waiting_queue: list[FakeReq] = field(default_factory=list)
    chunked_req: FakeReq | None = None
    enable_lora: bool = True
    gave_way: list[FakeReq] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.batch = Batch(self.running)
        manager = SimpleNamespace(validate_lora_batch=lambda adapters: len(adapters) <= LIMIT)
        self.tp_worker = SimpleNamespace(model_runner=SimpleNamespace(lora_manager=manager))
        self.slices = self
        self.adapters = Adapters(self, aside=self, memory=self, is_offline=is_offline)

    @property
    def reqs(self) -> list[FakeReq]:
        """Of what is aside."""
        return self.parked + self.suspended_reqs

    def preempt_suspended(self) -> None:
        self.gave_way += self.suspended_reqs
        self.suspended_reqs = []

    def preempt_aside(self, matches: Callable[[FakeReq], bool]) -> None:
        self.gave_way += filter(matches, self.parked)
        self.parked = [req for req in self.parked if not matches(req)]

    def preempt_rows(self, batch: Batch, reqs: list[FakeReq]) -> None:
        assert reqs
        self.gave_way += reqs
        batch.reqs = [req for req in batch.reqs if req not in reqs]

    def make_way(self) -> list[str | None]:
        """The adapters of those that give way."""
        self.adapters.make_way(self.batch)
        return [req.lora_id for req in self.gave_way]

    def may_run(self, *adapters: str) -> list[bool]:
        fits = self.adapters.may_run(self.batch)
        return [fits(adapter) for adapter in adapters]


def test_without_adapters_nobody_gives_way_and_all_may_run():
    engine = Engine(offline("a", "b"), waiting_queue=online("c"), enable_lora=False)
    assert engine.make_way() == []
    assert engine.may_run("x", "y", "z") == [True] * 3


def test_while_all_fit_nobody_gives_way():
    engine = Engine(offline("a", "a", None), waiting_queue=online("a"))
    assert engine.make_way() == []
    assert engine.batch.batch_is_full


def test_offline_requests_give_way_to_an_online_one_with_another_adapter():
    engine = Engine(online("a") + offline("b", "a"), waiting_queue=online("c"))
    assert engine.make_way() == ["b"]
    assert not engine.batch.batch_is_full  # rows came free


def test_so_do_those_that_are_aside():
    engine = Engine(
        online("a"), offline("b", "a"), suspended_reqs=offline("a"), waiting_queue=online("c")
    )
    assert engine.make_way() == ["b"]
    assert len(engine.suspended_reqs) == 1


def test_a_suspended_prefill_gives_way_as_a_whole():
    engine = Engine(online("a"), suspended_reqs=offline("a", "b"), waiting_queue=online("c"))
    assert engine.make_way() == ["a", "b"]


def test_what_was_first_stays_where_one_of_two_can():
    engine = Engine(offline("a", "b"), waiting_queue=online("c"))
    assert engine.make_way() == ["b"]


def test_where_online_requests_want_more_than_fits_only_what_they_run_anyway_stays():
    engine = Engine(online("a") + offline("a", "b"), waiting_queue=online("c", "d"))
    assert engine.make_way() == ["b"]


def test_the_base_model_counts_as_one():
    engine = Engine(offline(None, "b"), waiting_queue=online("c"))
    assert engine.make_way() == ["b"]
    assert engine.may_run("", "b") == [True, False]


def test_what_is_over_and_a_beam_search_do_not_give_way():
    over, beam = FakeReq("a", over=True), FakeReq("b", beam_group=object())
    engine = Engine([over, beam], waiting_queue=online("c"))
    assert engine.make_way() == []


def test_an_offline_request_is_let_in_beside_all_that_holds_a_row():
    engine = Engine(online("a"), parked=offline("b"))
    assert engine.may_run("b", "a", "c") == [True, True, False]


def test_a_prompt_between_two_chunks_counts():
    engine = Engine(chunked_req=online("a")[0])
    assert engine.may_run("b", "c") == [True, False]


def test_what_is_let_in_counts_for_the_next():
    assert Engine().may_run("a", "b", "c", "a") == [True, True, False, True]


def test_none_is_let_in_where_an_online_request_is_about_to_need_the_place():
    engine = Engine(online("a"), waiting_queue=online("b"))
    assert engine.may_run("c", "b") == [False, True]


ADAPTERS = st.lists(st.sampled_from([None, "a", "b", "c"]), max_size=4)


@given(ADAPTERS, ADAPTERS, ADAPTERS, ADAPTERS, ADAPTERS)
def test_all_that_holds_a_row_fits_into_a_batch(running, theirs, parked, suspended, waiting):
    """As long as SGLang keeps online requests within the limit, whatever it lets in of them."""
    theirs = theirs[:LIMIT]
    engine = Engine(
        online(*theirs) + offline(*running),
        offline(*parked),
        suspended_reqs=offline(*suspended),
        waiting_queue=online(*waiting),
    )
    engine.make_way()
    held = {req.lora_id for req in engine.batch.reqs}
    for adapter in waiting:  # as `Scheduler.can_schedule_lora_req` does
        if len(held | {adapter}) <= LIMIT:
            held.add(adapter)
    assert len(held | {req.lora_id for req in engine.reqs}) <= LIMIT
    # And no online request waits for an offline one.
    alone = set(theirs)
    for adapter in waiting:
        if len(alone | {adapter}) <= LIMIT:
            alone.add(adapter)
    assert alone <= held


def test_offline_requests_that_wait_are_not_starving_to_the_drainer():
    seen: list[Any] = []
    theirs = SimpleNamespace(
        update_draining_state=lambda waiting, running: seen.append((waiting, running)),
        can_schedule=lambda req: req.lora_id == "a",
    )
    drainer = OnlineDrainer(theirs, is_offline)
    waiting, running = online("a") + offline("b"), offline("c")
    drainer.update_draining_state(waiting, running)
    assert seen == [(waiting[:1], running)]
    assert drainer.can_schedule(waiting[0])
    assert not drainer.can_schedule(waiting[1])
