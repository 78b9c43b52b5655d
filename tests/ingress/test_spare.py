"""What the scheduler says it would take, over a real ipc socket, and what the HTTP layer does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx
import pytest
from starlette.responses import JSONResponse

from conserve_sgl.client.headers import Spare, spare_of
from conserve_sgl.ingress import middleware, spare
from conserve_sgl.ingress.in_hand import InHand
from conserve_sgl.ingress.middleware import SPARE_HEADER, ServiceClassMiddleware
from conserve_sgl.ingress.spare import (
    STALE_S,
    SpareNow,
    SpareReceiver,
    SpareRoom,
    SpareSender,
    spare_endpoint,
)

pytestmark = pytest.mark.timeout(30)
HEADER = SPARE_HEADER.decode()


@dataclass
class Clock:
    """The one clock of both ends."""

    now_s: float = 50.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(spare, "time", clock)
    return clock


class Channel:
    """Two connected ends."""

    def __init__(self, endpoint: str) -> None:
        self.sender = SpareSender(endpoint)
        self.receiver = SpareReceiver(endpoint)
        while self.receiver.latest() is None:  # a PUB socket drops while nobody has subscribed
            self.sender.send(-1, held=False)

    def send(self, requests: int, *, held: bool = False) -> None:
        """Send, and wait until it is there."""
        self.sender.send(requests, held=held)
        while self.receiver.latest().requests != requests:
            pass

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


@pytest.fixture
def channel(tmp_path) -> Iterator[Channel]:
    channel = Channel(f"ipc://{tmp_path}/spare")
    yield channel
    channel.close()


def test_two_servers_of_a_machine_have_an_endpoint_each():
    assert spare_endpoint("a") != spare_endpoint("b")


def test_before_the_first_message_nobody_knows(tmp_path):
    receiver = SpareReceiver(f"ipc://{tmp_path}/nobody")
    assert SpareRoom(receiver, InHand()).left() is None
    receiver.close()


def test_what_is_left_is_the_latest_message_less_what_went_since(channel, clock):
    in_hand = InHand()
    room = SpareRoom(channel.receiver, in_hand)
    channel.send(3)
    assert room.left() == 3
    in_hand.begin()
    assert room.left() == 2
    for _ in range(5):
        in_hand.begin()
    assert room.left() == 0
    clock.now_s += 1.0
    channel.send(7)
    assert room.left() == 7


def test_only_the_latest_of_many_messages_is_kept(channel):
    for requests in range(500):
        channel.sender.send(requests, held=False)
    channel.send(1000)
    assert SpareRoom(channel.receiver, InHand()).left() == 1000


def test_an_old_message_says_nothing(channel, clock):
    room = SpareRoom(channel.receiver, InHand())
    channel.send(3)
    clock.now_s += STALE_S
    assert room.left() == 3
    clock.now_s += 0.1
    assert room.left() is None


def test_a_pause_lasts_until_it_is_said_that_it_is_over(channel, clock):
    # The scheduler may sleep all the while.
    room = SpareRoom(channel.receiver, InHand())
    channel.send(0, held=True)
    clock.now_s += 1000.0
    assert room.left() == 0
    channel.send(3)
    assert room.left() == 3


# ------------------------------------------------------------------ the HTTP layer


@dataclass
class FakeReceiver:
    """Says what it is told to."""

    now: SpareNow | None = None

    def latest(self) -> SpareNow | None:
        return self.now


@dataclass
class Server:
    """An application that answers with `status` once `gate` is open, behind the layer."""

    take_spare_only: bool = True
    status: int = 200
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.receiver = FakeReceiver()
        in_hand = InHand()
        self.room: SpareRoom | None = SpareRoom(self.receiver, in_hand)
        self.layer = ServiceClassMiddleware(
            self._answer,
            max_offline=100,
            retry_after_s=7,
            in_hand=in_hand,
            room=lambda: self.room,
            take_spare_only=self.take_spare_only,
        )

    async def _answer(self, scope, receive, send) -> None:
        await self.gate.wait()
        await JSONResponse({}, self.status)(scope, receive, send)

    def says(self, requests: int, at_s: float = 50.0) -> None:
        self.receiver.now = SpareNow(requests, at_s)

    async def post(self, path: str = "/offline/generate") -> httpx.Response:
        transport = httpx.ASGITransport(app=self.layer)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
            return await http.post(path, json={})

    async def get(self, path: str) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.layer)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as http:
            return await http.get(path)

    async def in_hand(self, requests: int) -> list[asyncio.Task]:
        """So many that wait for the gate."""
        tasks = [asyncio.create_task(self.post()) for _ in range(requests)]
        while self.layer.in_hand.now() != requests:
            await asyncio.sleep(0)
        return tasks


async def test_beyond_what_it_would_take_a_request_is_answered_429():
    server = Server()
    server.says(2)
    waiting = await server.in_hand(2)
    refused = await server.post()
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "7"
    assert refused.headers[HEADER] == "0"
    server.gate.set()
    assert [(await task).status_code for task in waiting] == [200, 200]


async def test_a_new_message_makes_room():
    server = Server()
    server.says(1)
    await server.in_hand(1)
    assert (await server.post()).status_code == 429
    server.says(1, at_s=51.0)
    waiting = asyncio.create_task(server.post())
    server.gate.set()
    assert (await waiting).status_code == 200


async def test_while_nobody_knows_one_request_is_taken():
    # A scheduler that sleeps while it is idle says nothing, and wakes up for a request.
    server = Server()
    waiting = await server.in_hand(1)
    assert (await server.post()).status_code == 429
    server.gate.set()
    assert (await waiting[0]).status_code == 200


async def test_an_engine_that_wants_nothing_gets_nothing():
    # Offline work is paused.
    server = Server()
    server.says(0)
    assert (await server.post()).status_code == 429


async def test_a_server_that_takes_the_whole_queue_refuses_nobody_for_it():
    server = Server(take_spare_only=False)
    server.says(0)
    await server.in_hand(5)
    server.gate.set()
    assert (await server.post()).status_code == 200


async def test_every_answer_to_offline_work_says_what_else_would_be_taken():
    server = Server()
    server.gate.set()
    server.says(5)
    assert (await server.post()).headers[HEADER] == "4"
    assert (await server.post()).headers[HEADER] == "3"


async def test_it_says_how_long_it_had_the_request_when_it_said_so(clock, monkeypatch):
    monkeypatch.setattr(middleware, "time", clock)
    server = Server()
    server.says(5)
    (waiting,) = await server.in_hand(1)
    clock.now_s += 1.5
    server.gate.set()
    assert spare_of((await waiting).headers) == Spare(4, 1.5)


async def test_who_asks_for_the_model_as_offline_work_is_told_too():
    server = Server()
    server.gate.set()
    server.says(5)
    assert (await server.get("/offline/model_info")).headers[HEADER] == "5"
    assert HEADER not in (await server.get("/model_info")).headers
    assert server.layer.in_hand.now() == 0


@pytest.mark.parametrize(
    ("headers", "spare"),
    [
        ({}, None),
        ({"x-sgl-conserve-spare": "7"}, Spare(7, None)),
        ({"x-sgl-conserve-spare": "7", "x-sgl-conserve-spare-after-ms": "1"}, Spare(7, 0.001)),
        ({"x-sgl-conserve-spare": "7", "x-sgl-conserve-spare-after-ms": "-1"}, Spare(7, None)),
        ({"x-sgl-conserve-spare": "1e3", "x-sgl-conserve-spare-after-ms": "1"}, None),
        ({"x-sgl-conserve-spare": "9" * 99}, None),
        ({"x-sgl-conserve-spare": "\u0663"}, None),
    ],
)
def test_a_client_reads_it(headers, spare):
    assert spare_of(headers) == spare


@pytest.mark.parametrize("status", [429, 503])
async def test_a_refusal_from_further_in_says_that_nothing_would_be(status):
    server = Server(status=status)
    server.gate.set()
    server.says(5)
    assert (await server.post()).headers[HEADER] == "0"


async def test_online_answers_say_nothing_of_it():
    server = Server()
    server.gate.set()
    server.says(5)
    assert HEADER not in (await server.post("/generate")).headers


@pytest.mark.parametrize("room", [True, False])
async def test_where_nobody_knows_no_answer_says_anything(room):
    server = Server()
    server.room = server.room if room else None
    server.gate.set()
    assert HEADER not in (await server.post()).headers
