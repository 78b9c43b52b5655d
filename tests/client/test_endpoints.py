"""Which server the next request goes to."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from itertools import count

import pytest

from client.test_http import FakeClock
from conserve_sgl.client.endpoints import Endpoint, Endpoints
from conserve_sgl.client.interrupt import Stopped
from conserve_sgl.client.retry import Retry, RetryRule
from conserve_sgl.errors import JobError

A, B, C = "http://a", "http://b", "http://c"


class Fleet:
    """The endpoints of a run on a fake clock."""

    def __init__(self, *urls: str, most: int = 64, **retry: float) -> None:
        self.clock = FakeClock()
        self.stopping = asyncio.Event()
        settings = Retry(**retry)
        rule = RetryRule(settings, clock=self.clock, rng=random.Random(0))
        self.endpoints = Endpoints(
            urls, settings, rule, most=most, stopping=self.stopping, clock=self.clock
        )

    def __getitem__(self, url: str) -> Endpoint:
        (found,) = [e for e in self.endpoints.all if e.url == url]
        return found

    async def pick(self, times: int = 1, near: Endpoint | None = None) -> list[str]:
        return [(await self.endpoints.pick(near)).url for _ in range(times)]


async def test_requests_are_spread_by_the_room_that_windows_have():
    fleet = Fleet(A, B)
    fleet[B].window.answered(8, 48)
    assert fleet[B].window.size == 32
    assert Counter(await fleet.pick(10)) == {A: 2, B: 8}


async def test_one_that_is_full_is_left_alone_until_something_of_it_is_over():
    fleet = Fleet(A, most=2)
    await fleet.pick(2)
    waits = asyncio.create_task(fleet.endpoints.pick())
    await asyncio.sleep(0.01)
    assert not waits.done()
    fleet.endpoints.leave(fleet[A])
    assert (await waits).url == A
    assert fleet[A].in_flight == 2


async def test_who_waits_for_room_has_it_in_turn_and_one_looks_for_all(monkeypatch):
    fleet = Fleet(A, most=1)
    await fleet.pick()
    got: list[int] = []

    async def wait(number: int) -> None:
        await fleet.endpoints.pick()
        got.append(number)

    waiting = [asyncio.create_task(wait(i)) for i in range(50)]
    await asyncio.sleep(0.01)
    looks = []
    takes_more = Endpoint.takes_more
    monkeypatch.setattr(Endpoint, "takes_more", lambda *a: looks.append(1) or takes_more(*a))
    for _ in range(3):
        fleet.endpoints.leave(fleet[A])
        await asyncio.sleep(0.01)
    assert got == [0, 1, 2]
    assert len(looks) < 10
    for task in waiting:
        task.cancel()


async def test_whoever_waits_for_room_goes_to_a_server_that_is_new():
    fleet = Fleet(A, most=1)
    await fleet.pick()
    waits = asyncio.create_task(fleet.endpoints.pick())
    await asyncio.sleep(0.01)
    fleet.endpoints.use([A, B])
    assert (await waits).url == B


async def test_whoever_waits_for_room_is_stopped():
    fleet = Fleet(A, most=1)
    await fleet.pick()
    waits = asyncio.create_task(fleet.endpoints.pick())
    await asyncio.sleep(0.01)
    fleet.stopping.set()
    with pytest.raises(Stopped):
        await waits


async def test_what_one_refuses_goes_to_another_and_nothing_to_it_for_a_while():
    fleet = Fleet(A, B)
    await fleet.pick(2)
    fleet.endpoints.refused(fleet[A], 30.0)
    fleet.endpoints.leave(fleet[A])
    assert await fleet.pick(3) == [B, B, B]
    fleet.clock.now_s += 31.0
    assert A in await fleet.pick(2)


async def test_of_many_refusals_at_once_the_first_says_for_how_long():
    fleet = Fleet(A)
    await fleet.pick(3)
    for wait_s in (10.0, 20.0, 30.0):
        fleet.endpoints.refused(fleet[A], wait_s)
        fleet.endpoints.leave(fleet[A])
    await fleet.pick()
    assert fleet.clock.sleeps_s == [10.0]


async def test_a_server_that_says_that_it_takes_more_is_left_alone_no_longer():
    fleet = Fleet(A)
    await fleet.pick(4)
    fleet.endpoints.refused(fleet[A], 30.0)
    fleet.endpoints.leave(fleet[A])
    fleet.endpoints.served(fleet[A], 6)
    assert await fleet.pick() == [A]
    assert fleet.clock.sleeps_s == []


@pytest.mark.parametrize("spare", [None, 0])
async def test_an_answer_alone_does_not_shorten_what_it_asked_for(spare):
    fleet = Fleet(A)
    await fleet.pick(4)
    fleet.endpoints.refused(fleet[A], 30.0)
    fleet.endpoints.served(fleet[A], spare)
    fleet.endpoints.leave(fleet[A])
    fleet.endpoints.leave(fleet[A])
    fleet.endpoints.leave(fleet[A])
    await fleet.pick()
    assert fleet.clock.sleeps_s == [30.0]


async def test_a_server_that_asks_for_a_long_pause_is_not_down():
    fleet = Fleet(A, server_down_s=60.0)
    await fleet.pick()
    fleet.endpoints.answered(fleet[A])
    fleet.endpoints.refused(fleet[A], 300.0)
    fleet.endpoints.leave(fleet[A])
    assert await fleet.pick() == [A]


async def test_what_a_server_says_that_it_would_take_widens_its_window():
    fleet = Fleet(A, B)
    await fleet.pick(8)
    fleet.endpoints.served(fleet[A], 0)
    fleet.endpoints.served(fleet[B], 20)
    assert (fleet[A].window.size, fleet[B].window.size) == (8, 14)


async def test_of_those_that_stay_everything_stays_known():
    fleet = Fleet(A, B)
    fleet[B].identified = True
    b = fleet[B]
    fleet.endpoints.use([f"{B}/", C, C])
    assert [e.url for e in fleet.endpoints.all] == [B, C]
    assert fleet[B] is b


async def test_one_that_is_gone_gets_nothing_more_and_ends_what_it_has():
    fleet = Fleet(A, B)
    a = fleet[A]
    await fleet.pick(4)
    fleet.endpoints.use([B])
    assert await fleet.pick(2) == [B, B]
    assert await fleet.pick(near=a) == [B]
    fleet.endpoints.leave(a)
    assert a.in_flight == 1


async def test_without_any_server_the_run_ends_after_a_while():
    fleet = Fleet(server_down_s=60.0)
    with pytest.raises(JobError, match="no answer from any server for 60 s"):
        await fleet.endpoints.pick()
    assert fleet.clock.now_s == 1060.0


def test_prompts_that_begin_alike_have_one_home_and_others_are_spread():
    fleet = Fleet(A, B, C)
    homes = Counter(fleet.endpoints.home(b"task %d" % i).url for i in range(300))
    assert set(homes) == {A, B, C}
    assert max(homes.values()) < 150
    assert fleet.endpoints.home(b"task 7") is fleet.endpoints.home(b"task 7")


def test_only_the_prompts_of_a_server_that_goes_move():
    fleet = Fleet(A, B, C)
    before = {i: fleet.endpoints.home(b"task %d" % i).url for i in range(100)}
    fleet.endpoints.use([A, C])
    after = {i: fleet.endpoints.home(b"task %d" % i).url for i in range(100)}
    assert all(after[i] == url for i, url in before.items() if url != B)


async def test_a_home_that_has_too_much_to_do_is_none():
    fleet = Fleet(A, B)
    home = fleet.endpoints.home(b"task")
    home.in_flight = 4
    assert fleet.endpoints.home(b"task") is home
    home.in_flight = 5
    assert fleet.endpoints.home(b"task") is None


def test_a_server_alone_is_nobodys_home():
    assert Fleet(A).endpoints.home(b"task") is None


# ---------------------------------------------------------------- what is on its way


def test_what_a_server_had_not_seen_when_it_said_what_it_takes_is_taken_off():
    fleet = Fleet(A)
    for second in range(4):
        fleet.clock.now_s = 1000.0 + second
        fleet.endpoints.sent(fleet[A])
    assert fleet[A].spare_beside(10, 1001.5) == 8  # of 1002 and 1003
    assert fleet[A].spare_beside(1, 1001.5) == 0
    assert fleet[A].spare_beside(10, 1003.0) == 10
    assert fleet[A].spare_beside(10, 1002.9) is None  # it has said something since


async def test_a_server_that_came_back_has_seen_nothing_of_what_was_sent_before():
    fleet = Fleet(A)
    fleet.endpoints.sent(fleet[A])
    fleet[A].spare_beside(5, 2000.0)
    fleet[A].forget()
    assert fleet[A].spare_beside(5, 1000.5) == 5


class Wire:
    """One server with `takes` places and `rows`, a client, and the way between them, on one clock.

    Args:
        way_s: from one to the other, each way.
        tells: whether the server says how long it had a request when it says what it would take.
    """

    TAKES, ROWS, LINES = 36, 32, 4000

    def __init__(self, way_s: float, *, tells: bool) -> None:
        self.fleet = Fleet(A, B)
        self.server = self.fleet[A]
        self.way_s, self.tells = way_s, tells
        self.refused = self.answered = self.in_hand = self.running = 0
        self.busy_s = 0.0
        self.waiting: list[tuple[float, float]] = []
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.numbers = count()
        self.rng = random.Random(0)

    def run(self) -> None:
        self.client_sends()
        while self.answered < self.LINES:
            self.fleet.clock.now_s, _, happens = heappop(self.events)
            happens()
            self.client_sends()

    def after(self, seconds: float, happens: Callable[[], None]) -> None:
        when_s = self.fleet.clock.now_s + seconds
        heappush(self.events, (when_s, next(self.numbers), happens))

    def client_sends(self) -> None:
        now_s = self.fleet.clock.now_s
        while self.server.takes_more(now_s):
            self.server.in_flight += 1
            self.after(self.way_s, partial(self.arrives, self.fleet.endpoints.sent(self.server)))

    def arrives(self, sent_s: float) -> None:
        if self.in_hand == self.TAKES:
            self.after(self.way_s, self.comes_back)
            return
        self.in_hand += 1
        self.waiting.append((sent_s, self.fleet.clock.now_s))
        self.start()

    def start(self) -> None:
        while self.waiting and self.running < self.ROWS:
            self.running += 1
            took_s = self.rng.uniform(0.03, 0.07)
            self.busy_s += took_s
            self.after(took_s, partial(self.ends, *self.waiting.pop(0)))

    def ends(self, sent_s: float, came_s: float) -> None:
        self.running -= 1
        self.in_hand -= 1
        said_s = sent_s + self.fleet.clock.now_s - came_s if self.tells else None
        spare = self.TAKES - self.in_hand
        self.after(self.way_s, partial(self.is_answered, spare, said_s))
        self.start()

    def is_answered(self, spare: int, said_s: float | None) -> None:
        self.answered += 1
        self.fleet.endpoints.served(self.server, spare, said_s)
        self.fleet.endpoints.leave(self.server)

    def comes_back(self) -> None:
        self.refused += 1
        self.fleet.endpoints.refused(self.server, 0.5)
        self.fleet.endpoints.leave(self.server)
        self.after(0.5, lambda: None)

    @property
    def refused_share(self) -> float:
        return self.refused / (self.refused + self.answered)

    @property
    def rows_busy(self) -> float:
        return self.busy_s / self.ROWS / (self.fleet.clock.now_s - 1000.0)


@pytest.mark.parametrize("way_s", [0.0005, 0.005, 0.02])
def test_what_is_on_its_way_is_not_counted_twice(way_s):
    wire, twice = Wire(way_s, tells=True), Wire(way_s, tells=False)
    wire.run()
    twice.run()
    assert wire.refused_share < 0.01
    assert twice.refused_share > 0.1
    reach_s = 0.05 + 2 * way_s  # of one place, from one line to the next
    assert wire.rows_busy > 0.95 * min(1.0, Wire.TAKES * 0.05 / reach_s / Wire.ROWS)
