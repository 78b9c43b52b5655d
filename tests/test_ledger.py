"""The accounts of offline work, on fakes of SGLang's requests and a clock of the test's."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from conserve_sgl.engine.ledger import OfflineLedger
from conserve_sgl.engine.offline_item import offline_item, served_tokens
from conserve_sgl.policy import JobTag, OfflineQueue


@dataclass(eq=False)
class FakeReq:
    """What the ledger reads of SGLang's Req."""

    rid: str
    prompt: int = 10
    cached_tokens: int = 0
    extend_len: int = 0
    output_ids: list[int] = field(default_factory=list)
    finish: str | None = None
    tag: JobTag | None = None
    max_new_tokens: int | None = 20
    custom: dict[str, Any] | None = None
    extra_key: str | None = None
    lora_id: str | None = None
    finished_len: int | None = None

    def __post_init__(self) -> None:
        self.origin_input_ids = range(self.prompt)
        custom = self.custom if self.tag is None else self.tag.put_into(self.custom)
        self.sampling_params = SimpleNamespace(
            custom_params=custom, max_new_tokens=self.max_new_tokens
        )

    def finished(self) -> bool:
        return self.finish is not None

    @property
    def finished_reason(self) -> Any:
        return SimpleNamespace(to_json=lambda: {"type": self.finish})


def extend(*reqs: FakeReq, decoding: list[FakeReq] | None = None) -> Any:
    mode = SimpleNamespace(is_extend=lambda: True)
    return SimpleNamespace(forward_mode=mode, reqs=list(reqs), decoding_reqs=decoding)


def ledger_of(*reqs: FakeReq) -> OfflineLedger:
    """A ledger over a queue from which `reqs` were taken."""
    queue: OfflineQueue = OfflineQueue(100)
    for req in reqs:
        assert queue.push(req, offline_item(req))
    queue.take(len(reqs))
    return OfflineLedger(queue, lambda req: req.rid.startswith("off"))


# ------------------------------------------------------------------- the queue's record


def test_the_tag_is_read_and_taken_off():
    tag = JobTag(received_s=5.0, job="nightly", deadline_s=65.0)
    req = FakeReq("off", tag=tag, custom={"thinking_budget": 1})
    item = offline_item(req)
    assert (item.arrived_s, item.job, item.deadline_s) == (5.0, "nightly", 65.0)
    assert req.sampling_params.custom_params == {"thinking_budget": 1}
    assert item.adapter == ""
    assert offline_item(FakeReq("off", lora_id="a")).adapter == "a"
    bare = FakeReq("off", tag=tag)
    offline_item(bare)
    assert bare.sampling_params.custom_params is None


@pytest.mark.parametrize(
    ("limit", "prompt", "tokens"),
    [
        pytest.param(20, 10, 30, id="prompt and output limit"),
        pytest.param(100_000, 10, 1034, id="a wide limit is not believed"),
        pytest.param(None, 10, 1034, id="nor is none"),
        pytest.param(0, 10, 10, id="nothing to generate"),
        pytest.param(0, 0, 1, id="at least one"),
    ],
)
def test_the_tokens_expected(limit, prompt, tokens):
    assert offline_item(FakeReq("off", max_new_tokens=limit, prompt=prompt)).tokens == tokens


def test_cached_prompt_tokens_cost_nothing():
    assert served_tokens(FakeReq("off", prompt=10, cached_tokens=8, output_ids=[1, 2, 3])) == 5
    past_its_end = FakeReq("off", prompt=10, output_ids=[1, 2, 3, 4], finished_len=3)
    assert served_tokens(past_its_end) == 13


# -------------------------------------------------------------------------- the counts


def test_prefill_counts_offline_prompts_and_no_row_that_decodes():
    first, mixed = FakeReq("off-1", extend_len=6, cached_tokens=4), FakeReq("off-2", extend_len=9)
    ledger = ledger_of(first, mixed)
    ledger.step(0.0, extend(first, FakeReq("on", extend_len=50), mixed, decoding=[mixed]))
    assert ledger.tokens == {"computed": 6, "cached": 4, "output": 0}
    first.extend_len = 3  # its next chunk, or the same prompt again after a preemption
    ledger.step(0.1, extend(first))
    assert ledger.tokens == {"computed": 9, "cached": 4, "output": 0}


def test_a_step_without_a_batch_settles_what_is_done():
    """An engine with nothing to do may sleep until the next request comes."""
    done, runs = FakeReq("off-1", finish="stop"), FakeReq("off-2")
    ledger = ledger_of(done, runs)
    ledger.step(1.0, extend(done, runs))
    assert ledger.state(1.0, parked=0)["offline_running"] == 2
    ledger.step(1.1, None)
    state = ledger.state(1.1, parked=0)
    assert (state["offline_running"], state["offline_finished"]) == (1, 1)


def test_output_is_counted_while_it_comes_and_not_twice_after_a_preemption():
    req = FakeReq("off-1", extend_len=10)
    ledger = ledger_of(req)
    ledger.step(0.0, extend(req))
    req.output_ids += [1, 2]
    ledger.close_finished(1.0)
    assert ledger.tokens["output"] == 2
    ledger._queue.give_back([req])
    ledger._queue.take(1)
    ledger.step(1.0, extend(req))
    req.output_ids += [3]
    req.finish = "stop"
    ledger.close_finished(2.0)
    assert ledger.tokens["output"] == 3
    assert ledger.counts["offline_finished"] == 1
    assert ledger._queue.taken == []


@pytest.mark.parametrize(
    ("finish", "now_s", "counted"),
    [
        pytest.param("stop", 50.0, {"offline_finished": 1}, id="in time"),
        pytest.param(
            "length", 70.0, {"offline_finished": 1, "offline_deadline_missed": 1}, id="late"
        ),
        pytest.param("abort", 70.0, {"offline_aborted": 1}, id="aborted"),
    ],
)
def test_how_it_ended(finish, now_s, counted):
    req = FakeReq("off-1", tag=JobTag(received_s=0.0, deadline_s=60.0), finish=finish)
    ledger = ledger_of(req)
    ledger.close_finished(now_s)
    assert {name: count for name, count in ledger.counts.items() if count} == counted


def test_a_request_closed_while_put_aside_was_aborted_and_is_closed_once():
    req = FakeReq("off-1")
    ledger = ledger_of(req)
    ledger.close(0.0, req)
    ledger.close(0.0, req)
    ledger.close_finished(0.0)
    assert ledger.counts["offline_aborted"] == 1


def test_nothing_is_kept_of_requests_that_are_gone():
    done, left = FakeReq("off-1", extend_len=1), FakeReq("off-2", extend_len=1)
    ledger = ledger_of(done, left)
    ledger.step(0.0, extend(done, left))
    ledger._queue.give_back([left])
    ledger.removed(ledger._queue.remove_rid("off-2"))
    done.finish = "stop"
    ledger.close_finished(1.0)
    assert ledger._outputs == {}
    assert ledger.counts["offline_aborted"] == 1


def test_finished_requests_are_found_without_being_asked_for():
    req = FakeReq("off-1", finish="stop")
    ledger = ledger_of(req)
    for step in range(40):
        ledger.step(float(step), None)
    assert ledger.counts["offline_finished"] == 1


# ---------------------------------------------------------------------------- the rate


def at_risk_after(seconds: int, tokens_a_second: int, pause_s: int = 0) -> int:
    """Of ten requests of 30 tokens due in 100 s, those at risk after so long at such a rate."""
    running = FakeReq("off-running", extend_len=1)
    ledger = ledger_of(running)
    ledger.step(1.0, extend(running))
    for second in range(seconds):
        running.output_ids += [0] * tokens_a_second
        ledger.close_finished(1.0 + second)
    now_s = float(seconds + pause_s)
    for i in range(10):
        req = FakeReq(f"off-{i}", tag=JobTag(received_s=now_s, deadline_s=now_s + 100.0))
        ledger._queue.push(req, offline_item(req))
    return ledger.backlog(now_s).at_risk


@pytest.mark.parametrize(
    ("seconds", "tokens_a_second", "at_risk"),
    [
        pytest.param(2, 0, 0, id="too early to tell"),
        pytest.param(30, 100, 0, id="fast enough"),
        pytest.param(30, 0, 10, id="nothing moves"),
        pytest.param(30, 2, 4, id="too slow for some"),
    ],
)
def test_what_is_at_risk_follows_the_rate_of_the_last_minute(seconds, tokens_a_second, at_risk):
    assert at_risk_after(seconds, tokens_a_second) == at_risk


def test_time_without_offline_work_says_nothing_of_the_rate():
    done = FakeReq("off-done", extend_len=1, max_new_tokens=None)
    ledger = ledger_of(done)
    ledger.step(1.0, extend(done))
    for second in range(1, 31):
        done.output_ids += [0] * 100
        ledger.close_finished(float(second))
    done.finish = "stop"
    for second in range(31, 500):
        ledger.close_finished(float(second))
    req = FakeReq("off-new", tag=JobTag(received_s=500.0, deadline_s=510.0))
    ledger._queue.push(req, offline_item(req))
    assert ledger.backlog(500.0).at_risk == 0
