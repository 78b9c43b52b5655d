from __future__ import annotations

import asyncio
import itertools
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import ModuleType
from typing import Any

import pytest
from aiohttp.test_utils import TestServer as AppServer

from conserve_sgl.bench.load.arrivals import Arrival
from conserve_sgl.bench.load.prompts import TimedRequest, TokenIds, timed_requests
from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.load.streams import keep_in_flight, replay


def stream(count: int, *, every_s: float = 0.0, output_tokens: int = 4) -> tuple[TimedRequest, ...]:
    arrivals = [Arrival(every_s * i, 10 + i, output_tokens) for i in range(count)]
    return timed_requests(arrivals, TokenIds(), 1)


@asynccontextmanager
async def serving(engine: object) -> AsyncIterator[str]:
    async with AppServer(engine.app()) as server:
        yield f"http://{server.host}:{server.port}"


async def test_a_record_holds_what_the_server_streamed(fake_engine: ModuleType) -> None:
    async with serving(fake_engine.FakeEngine(chunk_tokens=2)) as url:
        result = await replay(url, stream(3, every_s=0.02), drain_s=30)

    for i, record in enumerate(result.records):
        assert record.completed
        assert record.chunk_tokens == (2, 2)
        assert record.prompt_tokens == 10 + i
        assert record.cached_tokens == fake_engine.CACHED_TOKENS
        assert record.due_s == pytest.approx(0.02 * i)
        assert record.due_s <= record.sent_s < record.chunk_times_s[0]
        assert record.chunk_times_s[-1] == record.done_s <= result.duration_s


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("busy", "HTTP 503: .*come back later"),
        ("drop", "the stream ended before the answer did"),
        ("abort", "aborted"),
        ("error", "out of luck"),
    ],
)
async def test_a_fault_is_recorded_and_spares_the_others(
    fake_engine: ModuleType, fault: str, error: str
) -> None:
    async with serving(fake_engine.FakeEngine(faults=(fault, None))) as url:
        bad, good = (await replay(url, stream(2, every_s=0.05), drain_s=30)).records

    assert good.completed
    assert bad.done_s is None
    assert re.search(error, bad.error)


async def test_a_dead_server_is_recorded(fake_engine: ModuleType) -> None:
    async with serving(fake_engine.FakeEngine()) as url:
        pass

    (record,) = (await replay(url, stream(1), drain_s=30)).records

    assert record.error.startswith("ClientConnectorError")


async def test_arrivals_do_not_wait_for_answers(fake_engine: ModuleType) -> None:
    """More than aiohttp's default of 100 connections, and no answer before the last request."""
    engine, count = fake_engine.FakeEngine(), 150
    engine.gate.clear()

    async def open_gate_when_all_are_in() -> None:
        while len(engine.bodies) < count:
            await asyncio.sleep(0.01)
        engine.gate.set()

    async with serving(engine) as url:
        gate = asyncio.create_task(open_gate_when_all_are_in())
        result = await replay(url, stream(count), drain_s=60)
        await gate

    assert all(record.completed for record in result.records)


async def test_requests_that_do_not_end_are_given_up_and_recorded(fake_engine: ModuleType) -> None:
    engine = fake_engine.FakeEngine()
    engine.gate.clear()

    async with serving(engine) as url:
        result = await replay(url, stream(3), drain_s=0.2)
        engine.gate.set()

    assert [record.error for record in result.records] == ["did not finish in time"] * 3


async def test_one_given_up_in_the_middle_keeps_what_it_got(
    fake_engine: ModuleType,
) -> None:
    engine = fake_engine.FakeEngine(faults=("stall",))

    async with serving(engine) as url:
        (record,) = (await replay(url, stream(1), drain_s=0.3)).records
        engine.gate.set()

    assert record.error == "did not finish in time"
    assert record.chunk_tokens == (1, 1, 1)


async def test_each_end_is_told_once(fake_engine: ModuleType) -> None:
    told: list[RequestRecord] = []

    async with serving(fake_engine.FakeEngine(faults=(None, "busy"))) as url:
        result = await replay(url, stream(4), drain_s=30, on_done=told.append)

    assert sorted(told, key=lambda r: r.sent_s) == list(result.records)


async def test_no_requests_is_an_empty_result() -> None:
    result = await replay("http://127.0.0.1:1", (), drain_s=30)

    assert result.records == ()


def endless(output_tokens: int = 4) -> Iterator[bytes]:
    return itertools.repeat(stream(1, output_tokens=output_tokens)[0].body)


async def work_until(engine: object, enough: int, in_flight: int) -> tuple[RequestRecord, ...]:
    """Keep requests in flight until the engine has seen `enough`."""
    stop, start_s = asyncio.Event(), time.perf_counter()
    async with serving(engine) as url:
        work = keep_in_flight(
            url, endless(), in_flight, stop, start_s=start_s, headers={"x-class": "offline"}
        )
        task = asyncio.create_task(work)
        while len(engine.bodies) < enough:
            await asyncio.sleep(0.005)
        stop.set()
        return await task


async def test_a_backlog_keeps_so_many_in_flight_and_no_more(fake_engine: ModuleType) -> None:
    engine = fake_engine.FakeEngine()

    records = await work_until(engine, enough=40, in_flight=5)

    assert engine.most_in_hand <= 5
    assert len(records) == len(engine.bodies) >= 40
    done = [record for record in records if record.completed]
    assert len(records) - len(done) <= 5
    assert {record.class_ for record in records} == {"offline"}
    assert {headers["x-class"] for headers in engine.headers} == {"offline"}
    assert all(record.prompt_tokens == 10 for record in done)


async def test_what_runs_when_a_backlog_stops_keeps_what_it_had_got(
    fake_engine: ModuleType,
) -> None:
    engine = fake_engine.FakeEngine()
    engine.gate.clear()

    records = await work_until(engine, enough=3, in_flight=3)

    assert [(r.completed, r.chunk_tokens) for r in records] == [(False, ())] * 3


async def test_a_refusing_server_is_not_flooded(
    fake_engine: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def pause(delay_s: float, sleep: Callable[..., Any] = asyncio.sleep) -> None:
        pauses.append(delay_s)
        await sleep(0)

    monkeypatch.setattr("conserve_sgl.bench.load.streams.asyncio.sleep", pause)
    records = await work_until(fake_engine.FakeEngine(faults=("busy",)), enough=6, in_flight=2)

    refused = [record for record in records if "HTTP 503" in record.error]
    assert len(refused) >= 4
    assert pauses.count(0.2) >= len(refused) - 2


async def test_a_stream_can_begin_later(fake_engine: ModuleType) -> None:
    async with serving(fake_engine.FakeEngine()) as url:
        start_s = time.perf_counter() + 0.1
        result = await replay(url, stream(2, every_s=0.02), drain_s=30, start_s=start_s)

    assert all(record.sent_s >= record.due_s for record in result.records)
    assert result.duration_s > 0
