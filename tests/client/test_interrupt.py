"""Errors and signals while requests are in flight."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from conserve_sgl.client.interrupt import Interrupt

FOREVER = 1e6


class Flight:
    """Workers side by side: one that fails at once, one that is in flight until `landed`."""

    def __init__(self, drain_s: float = FOREVER) -> None:
        self.said: list[str] = []
        self.spoke = asyncio.Event()
        self.landed = asyncio.Event()
        self.cancelled = False
        self.interrupt = Interrupt(drain_s, self._say)

    def _say(self, text: str) -> None:
        self.said.append(text)
        self.spoke.set()

    async def fail(self) -> None:
        raise OSError("no such thing")

    async def fly(self) -> None:
        try:
            await self.landed.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise

    async def tick(self) -> None:
        await asyncio.Event().wait()

    async def heard(self) -> None:
        """Wait until something more was said."""
        await self.spoke.wait()
        self.spoke.clear()


async def test_an_error_waits_for_what_is_in_flight():
    flight = Flight()
    run = asyncio.create_task(flight.interrupt.run([flight.fail(), flight.fly()], flight.tick()))
    await flight.heard()
    assert flight.said == ["no such thing. Waiting for what is in flight (Ctrl-C to leave)"]
    assert flight.interrupt.stopping.is_set()
    assert not run.done()
    flight.landed.set()
    with pytest.raises(OSError, match="no such thing"):
        await run
    assert not flight.cancelled


async def test_an_error_of_the_ticker_is_one_too():
    flight = Flight()
    run = asyncio.create_task(flight.interrupt.run([flight.fly()], flight.fail()))
    await flight.heard()
    flight.landed.set()
    with pytest.raises(OSError, match="no such thing"):
        await run


@pytest.mark.parametrize("signals", [1, 2])
async def test_who_does_not_want_to_wait_for_it_interrupts(signals):
    """Once leaves what is in flight some time, here none; twice does not ask."""
    flight = Flight(drain_s=0 if signals == 1 else FOREVER)
    run = asyncio.create_task(flight.interrupt.run([flight.fail(), flight.fly()], flight.tick()))
    await flight.heard()
    for _ in range(signals):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0)
    with pytest.raises(OSError, match="no such thing"):
        await run
    assert flight.cancelled
    assert "stopping" in flight.said[1]


async def test_without_others_in_flight_nothing_is_said():
    flight = Flight()
    with pytest.raises(OSError, match="no such thing"):
        await flight.interrupt.run([flight.fail()], flight.tick())
    assert flight.said == []
