from __future__ import annotations

import asyncio

import pytest

from conserve_sgl.client.in_flight import send_all
from conserve_sgl.client.interrupt import Interrupt, Stopped


class Server:
    """Takes numbers, and answers them when `gate` is open."""

    def __init__(self) -> None:
        self.interrupt = Interrupt(1e6, lambda _: None)
        self.gate = asyncio.Event()
        self.asked: list[int] = []
        self.active = self.peak = 0

    async def answer(self, number: int) -> None:
        self.asked.append(number)
        self.active += 1
        self.peak = max(self.peak, self.active)
        await self.gate.wait()
        self.active -= 1

    def take(self, numbers, send=None, in_flight: int = 3) -> asyncio.Task[None]:
        ticker = asyncio.Event().wait()
        sending = send_all(
            iter(numbers),
            send or self.answer,
            in_flight=in_flight,
            interrupt=self.interrupt,
            ticker=ticker,
        )
        return asyncio.create_task(sending)

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


async def test_so_many_are_in_flight_and_the_others_follow_in_order():
    server = Server()
    sending = server.take(range(10))
    await server.settle()
    assert server.asked == [0, 1, 2]
    server.gate.set()
    await sending
    assert server.asked == list(range(10))
    assert server.peak == 3


async def test_once_it_is_being_stopped_nothing_more_is_taken():
    server = Server()
    numbers = iter(range(10))
    sending = server.take(numbers)
    await server.settle()
    server.interrupt.stopping.set()
    server.gate.set()
    await sending
    assert server.asked == [0, 1, 2]
    assert next(numbers) == 3


async def test_an_item_that_was_not_sent_because_of_that_ends_its_place_quietly():
    server = Server()

    async def stop(_number: int) -> None:
        raise Stopped

    numbers = iter(range(10))
    await server.take(numbers, stop)
    assert next(numbers) == 3


async def test_an_error_ends_it_once_the_others_are_done():
    server = Server()

    async def send(number: int) -> None:
        if number == 1:
            raise OSError("no such thing")
        await server.answer(number)

    sending = server.take(range(10), send)
    await server.settle()
    assert not sending.done()
    server.gate.set()
    with pytest.raises(OSError, match="no such thing"):
        await sending
    assert server.asked == [0, 2]
