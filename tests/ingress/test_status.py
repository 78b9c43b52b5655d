"""`GET /conserve/status`: what is asked for, and what comes of the scheduler's answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from conserve_sgl.ingress.status import STATUS_PATH, add_status_route
from conserve_sgl.policy import Bound
from conserve_sgl.status.ask import Answer, Ask
from conserve_sgl.status.record import BatchLine, Snapshot
from conserve_sgl.status.steps import StepRing
from status.examples import RECORD

BATCH = BatchLine(
    id="batch_1",
    status="in_progress",
    total=3,
    completed=1,
    failed=0,
    created_at_s=1.0,
    expires_at_s=2.0,
)


class Scheduler:
    """Keeps ten steps, and answers as ours does."""

    def __init__(self) -> None:
        self.ring = StepRing()
        names = ("online_prompt_tokens", "offline_prompt_tokens", "offline_rows", "arrivals")
        names += ("offline_parked", "preemptions", "yields")
        for seq in range(10):
            self.ring.formed(float(seq), bound=Bound.KV, online_rows=seq, **dict.fromkeys(names, 0))
            self.ring.ended(seq + 0.5, 0.5, sliced=False)
        self.asked: list[Ask | None] = []

    async def ask(self, rid: str) -> Mapping[str, Any]:
        ask = Ask.of_rid(rid)
        self.asked.append(ask)
        assert ask is not None
        first, steps = self.ring.read(ask.since, ask.most)
        answer = Answer(msgspec.json.encode(RECORD), first, steps, epoch_s=1000.0)
        return msgspec.msgpack.decode(msgspec.msgpack.encode(msgspec.structs.asdict(answer)))


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


@pytest.fixture
def client(scheduler) -> TestClient:
    async def batches() -> list[BatchLine]:
        return [BATCH]

    app = FastAPI()
    add_status_route(app, scheduler.ask, batches)
    return TestClient(app)


def get(client: TestClient, **query: object) -> Snapshot:
    response = client.get(STATUS_PATH, params=query)
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    return msgspec.json.decode(response.content, type=Snapshot)


@pytest.mark.parametrize(
    ("query", "ask", "seqs"),
    [
        ({}, Ask(since=None, most=0), []),
        ({"since": 7}, Ask(since=7, most=None), [7, 8, 9]),
        ({"steps": 2}, Ask(since=None, most=2), [8, 9]),
        ({"since": 3, "steps": 4}, Ask(since=3, most=4), [6, 7, 8, 9]),
        ({"since": 99}, Ask(since=99, most=None), []),
    ],
)
def test_the_steps_that_are_asked_for_come(client, scheduler, query, ask, seqs):
    seen = get(client, **query)
    assert scheduler.asked == [ask]
    assert [step.seq for step in seen.steps] == seqs
    assert [step.online_rows for step in seen.steps] == seqs
    assert [step.start_s for step in seen.steps] == [1000.0 + seq for seq in seqs]


def test_the_rest_is_the_scheduler_s_record_with_the_batches_of_this_process(client):
    seen = get(client)
    assert seen == msgspec.structs.replace(RECORD, batches=(BATCH,))


@pytest.mark.parametrize("name", ["since", "steps"])
@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "1e3", "9" * 16, "٣", " 1"])
def test_what_is_no_number_is_answered_400_by_its_name(client, scheduler, name, text):
    response = client.get(STATUS_PATH, params={name: text})
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(f"{name} is a number from 0 on")
    assert scheduler.asked == []


@pytest.mark.parametrize(
    "rid",
    [
        None,
        "",
        "HEALTH_CHECK_1",
        "conserve-status:",
        "conserve-status:tea",
        'conserve-status:{"since":-1}',
        'conserve-status:{"most":1e400}',
        "conserve-status:\udcff",
    ],
)
def test_an_id_that_asks_for_nothing_of_ours_is_sglang_s(rid):
    assert Ask.of_rid(rid) is None
