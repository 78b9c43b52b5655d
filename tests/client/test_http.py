from __future__ import annotations

import asyncio
import random
from contextlib import asynccontextmanager

import msgspec
import pytest

from conserve_sgl.client.clock import Clock
from conserve_sgl.client.http import BadReply, Client, LineFailed, NoSuchPath
from conserve_sgl.client.interrupt import Stopped
from conserve_sgl.client.retry import Attempts, Retry
from conserve_sgl.errors import JobError

WALL_S = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


class FakeClock(Clock):
    """A clock that jumps ahead by what is slept, and notes it."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.sleeps_s: list[float] = []

    def monotonic_s(self) -> float:
        return self.now_s

    def wall_s(self) -> float:
        return WALL_S + self.now_s - 1000.0

    async def sleep(self, seconds: float) -> None:
        self.sleeps_s.append(seconds)
        self.now_s += seconds
        await asyncio.sleep(0)


class Servers(msgspec.Struct, frozen=True):
    """Where to send; a `Target`."""

    endpoints: list[str]
    retry: Retry
    request_timeout_s: float | None = None
    max_in_flight: int = 64
    discover: str | None = None


class Bench:
    """A client on a fake clock, what it noted, and the models it met."""

    def __init__(
        self,
        *urls: str,
        name: str = "job",
        deadline_s: float | None = None,
        target: Servers | None = None,
        **retry: object,
    ) -> None:
        self.clock = FakeClock()
        self.notes: list[str | None] = []
        self.models: list[str] = []
        self.stopping = asyncio.Event()
        retry = {"first_delay_s": 1, "max_delay_s": 8} | retry
        self.client = Client(
            target or Servers(list(urls), Retry(**retry)),
            name=name,
            deadline_s=self.clock.deadline_s(deadline_s),
            api_key=None,
            identify=self.models.append,
            note=self.notes.append,
            stopping=self.stopping,
            clock=self.clock,
            rng=random.Random(0),
        )

    async def post(self, text: str = "x", attempts: Attempts | None = None):
        body = {"text": text}
        return await self.client.post("/generate", body, read, attempts or Attempts())


def read(raw: bytes) -> str:
    reply = msgspec.json.decode(raw)
    if reply["meta_info"]["finish_reason"]["type"] == "abort":
        raise BadReply("aborted")
    return reply["text"]


@asynccontextmanager
async def bench(*urls: str, **options: object):
    made = Bench(*urls, **options)
    async with made.client:
        yield made


async def test_busy_is_retried_far_beyond_the_attempts_for_other_faults(server):
    server.script["x"] = [(503, {}), (429, {})] * 10
    async with bench(server.url, max_attempts=2) as b:
        attempts = Attempts()
        answer, endpoint = await b.post(attempts=attempts)
        assert (answer, endpoint.url) == ("X", server.url)
        assert (attempts.sent, attempts.busy, attempts.lost) == (21, 20, 0)
        assert len(b.clock.sleeps_s) == 20
        assert all(4 <= s <= 8 for s in b.clock.sleeps_s[4:])
        assert b.notes[-2].startswith(f"{server.url}: 429 scripted; retry in")
        assert b.notes[-1] is None


async def test_retry_after_is_honoured_as_seconds_and_as_a_date(server):
    date = "Tue, 14 Nov 2023 22:15:00 GMT"
    server.script["x"] = [(429, {"Retry-After": "17"}), (503, {"Retry-After": date})]
    async with bench(server.url) as b:
        await b.post()
        first_s, second_s = b.clock.sleeps_s
        # And a pause, in which those part that were refused at the same time.
        assert 17 + 0.5 <= first_s <= 17 + 1
        assert 1 <= second_s - (100 - first_s) <= 2


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ((500, {}), 500),
        ((502, {}), 502),
        ((504, {}), 504),
        ((408, {}), 408),
        ("drop", None),
        ("abort", 200),
        ("nonsense", 200),
    ],
)
async def test_a_line_that_is_lost_too_often_has_failed(server, fault, status):
    server.script["x"] = [fault] * 3
    server.script["y"] = [fault] * 2
    async with bench(server.url, max_attempts=3) as b:
        with pytest.raises(LineFailed, match=r"lost 3 times") as failed:
            await b.post("x")
        assert failed.value.status == status
        assert len(b.clock.sleeps_s) == 2
        assert (await b.post("y"))[0] == "Y"


async def test_a_refused_line_fails_at_once(server):
    server.script["x"] = [(413, {})]
    async with bench(server.url) as b:
        with pytest.raises(LineFailed, match="scripted"):
            await b.post()
        assert b.clock.sleeps_s == []


async def test_a_key_that_is_wrong_ends_the_job(server):
    server.script["x"] = [(401, {})]
    async with bench(server.url) as b:
        with pytest.raises(JobError, match="/generate: 401 scripted: it wants another API key"):
            await b.post()


@pytest.mark.parametrize("status", [403, 404])
async def test_what_may_be_about_one_line_fails_that_line(server, status):
    server.script["x"] = [(status, {})]
    async with bench(server.url) as b:
        with pytest.raises(LineFailed, match="scripted") as failed:
            await b.post()
        assert not isinstance(failed.value, NoSuchPath)
        assert failed.value.status == status
        assert (await b.post())[0] == "X"


@pytest.mark.parametrize(("path", "status"), [("/nowhere", 404), ("/model_info", 405)])
async def test_a_path_that_is_not_there_is_told_from_a_line_that_is_refused(server, path, status):
    async with bench(server.url) as b:
        for _ in range(2):
            with pytest.raises(NoSuchPath, match=f"{server.url} has no {path}: ") as failed:
                await b.client.post(path, {"text": "x"}, read, Attempts())
            assert (failed.value.status, failed.value.path) == (status, path)


async def test_a_server_that_stays_down_ends_the_job_after_a_while(server):
    server.stop()
    async with bench(server.url, server_down_s=60) as b:
        with pytest.raises(JobError, match=r"no answer from .* for 60 s.*run the same command"):
            await b.post()
        assert 1060 <= b.clock.now_s <= 1068
        assert sum(b.clock.sleeps_s[:3]) < 8  # it starts with short waits
    server.restart()


async def test_a_server_that_comes_back_is_used_and_asked_again_who_it_is(server):
    async with bench(server.url, server_down_s=60) as b:
        await b.post()
        server.stop()
        server.model = "other"
        came_back = False

        async def sleep(seconds: float) -> None:
            nonlocal came_back
            b.clock.now_s += seconds
            if b.clock.now_s > 1030 and not came_back:
                came_back = True
                server.restart()

        b.clock.sleep = sleep
        attempts = Attempts()
        assert (await b.post(attempts=attempts))[0] == "X"
        assert b.models == ["tiny", "other"]
        assert attempts.lost <= 1  # waiting for the server does not use up the line's attempts


async def test_work_goes_to_the_endpoint_with_the_least_in_flight(server, second_server):
    async with bench(server.url, second_server.url) as b:
        server.hold.clear()
        second_server.hold.clear()
        posts = [asyncio.create_task(b.post(f"p{i}")) for i in range(6)]
        await asyncio.to_thread(server.wait_until, lambda s: s.active == 3)
        await asyncio.to_thread(second_server.wait_until, lambda s: s.active == 3)
        second_server.hold.set()
        await asyncio.to_thread(second_server.wait_until, lambda s: s.active == 0)
        await asyncio.wait(posts, return_when=asyncio.FIRST_COMPLETED)
        _, endpoint = await b.post("next")
        assert endpoint.url == second_server.url
        server.hold.set()
        await asyncio.gather(*posts)


async def test_an_endpoint_that_refuses_is_benched_and_the_other_takes_over(server, second_server):
    server.stop()
    async with bench(server.url, second_server.url) as b:
        endpoints = {(await b.post(f"p{i}"))[1].url for i in range(5)}
        assert endpoints == {second_server.url}
        assert b.clock.sleeps_s == []
        assert sum(note is not None for note in b.notes) == 1
        b.clock.now_s += 10
        server.restart()
        assert (await b.post("later"))[1].url == server.url


async def test_near_is_preferred_while_it_is_up(server, second_server):
    async with bench(server.url, second_server.url) as b:
        near = b.client.endpoints[1]
        _, endpoint = await b.client.post("/generate", {"text": "x"}, read, Attempts(), near)
        assert endpoint is near


async def test_stopping_ends_a_wait(server):
    server.always = (429, {"Retry-After": "9"})
    async with bench(server.url) as b:
        b.clock.sleep = lambda _seconds: asyncio.Event().wait()  # it never ends by itself
        post = asyncio.create_task(b.post())
        await asyncio.to_thread(server.wait_until, lambda s: len(s.requests) == 1)
        b.stopping.set()
        with pytest.raises(Stopped):
            await post


async def test_a_gateway_that_does_not_tell_its_model_is_fine(server):
    server.model = ""
    async with bench(server.url) as b:
        assert (await b.post())[0] == "X"
        assert b.models == []


# --------------------------------------------------------------- what the server is told


async def test_every_request_names_its_job_and_the_time_left(server):
    async with bench(server.url, name="nightly évals", deadline_s=60.0) as b:
        b.clock.now_s += 10
        await b.post("one")
        b.clock.now_s += 100
        await b.post("two")
    told = [h for path, h, _ in server.requests if path == "/generate"]
    assert [h["x-sgl-conserve-job"] for h in told] == ["nightly évals"] * 2
    assert [float(h["x-sgl-conserve-deadline-s"]) for h in told] == [50.0, -50.0]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        pytest.param("x" * 200, "x" * 128, id="too long"),
        pytest.param("a\r\nx-other: b", "ax-other: b", id="a line break"),
        pytest.param("\n", None, id="nothing that can be sent"),
    ],
)
async def test_a_name_that_a_header_cannot_hold_is_cut(server, name, told):
    async with bench(server.url, name=name) as b:
        await b.post("one")
    (headers,) = [h for path, h, _ in server.requests if path == "/generate"]
    assert headers.get("x-sgl-conserve-job") == told
    assert "x-sgl-conserve-deadline-s" not in headers
    assert "x-other" not in headers
