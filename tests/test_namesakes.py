"""An abort ends the request that it names, in a scheduler that matches ids as SGLang's does."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from conserve_sgl.engine.namesakes import namesakes_spared


class Scheduler:
    """As far as an abort goes: queued requests leave, the others are marked."""

    def __init__(self, *, waiting=(), compiling=(), running=(), chunk=None) -> None:
        self.waiting_queue = list(waiting)
        self.grammar_manager = SimpleNamespace(grammar_queue=list(compiling))
        self.running = set(running)
        self.chunked_req = chunk
        self._pending_chunked_abort_req = None

    def collect_inflight_reqs(self):
        return self.running

    def abort_request(self, rid: str) -> None:
        def matches(req) -> bool:
            return req.rid.startswith(rid)

        if self.chunked_req is not None and matches(self.chunked_req):
            self._pending_chunked_abort_req = self.chunked_req
        self.waiting_queue = [req for req in self.waiting_queue if not matches(req)]
        for req in [*self.grammar_manager.grammar_queue, *self.running]:
            if matches(req):
                req.to_finish = "abort"


class Req:
    def __init__(self, rid: str, to_finish: str | None = None) -> None:
        self.rid = rid
        self.to_finish = to_finish


def abort(scheduler: Scheduler, rid: str) -> None:
    with namesakes_spared(scheduler, rid):
        scheduler.abort_request(rid)


def rids(reqs) -> list[str]:
    return [req.rid for req in reqs]


def test_in_the_queue():
    names = ["job-10", "job-2", "job-1", "job-11", "job"]
    scheduler = Scheduler(waiting=map(Req, names))
    abort(scheduler, "job-1")
    assert rids(scheduler.waiting_queue) == ["job-10", "job-2", "job-11", "job"]


def test_running_and_before_a_grammar():
    running = [Req("job-1"), Req("job-10"), Req("job-12", to_finish="length"), Req("other")]
    compiling = [Req("job-11"), Req("job-1")]
    scheduler = Scheduler(running=running, compiling=compiling)
    abort(scheduler, "job-1")
    assert [req.to_finish for req in running] == ["abort", None, "length", None]
    assert scheduler.grammar_manager.grammar_queue == compiling
    assert [req.to_finish for req in compiling] == [None, "abort"]


@pytest.mark.parametrize(("chunk", "marked"), [("job-1", "job-1"), ("job-10", None), ("x", None)])
def test_between_two_chunks(chunk, marked):
    scheduler = Scheduler(chunk=Req(chunk))
    abort(scheduler, "job-1")
    pending = scheduler._pending_chunked_abort_req
    assert (None if pending is None else pending.rid) == marked


def test_an_abort_that_was_pending_stays_so():
    earlier = Req("job-10")
    scheduler = Scheduler(chunk=earlier)
    scheduler.abort_request("job-10")
    abort(scheduler, "job-1")
    assert scheduler._pending_chunked_abort_req is earlier
