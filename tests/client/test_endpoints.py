"""Which server the next request goes to."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

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
