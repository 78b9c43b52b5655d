"""How a run ends early: nothing more is sent, what is in flight may finish, then it leaves.

Ctrl-C and SIGTERM end it so, and so does an error that no other line would escape.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from conserve_sgl.client.clock import Clock, first_of

__all__ = ["Interrupt", "Stopped", "pause"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """The run is being stopped and this line had nothing in flight."""


async def pause(seconds: float, stopping: asyncio.Event, clock: Clock) -> None:
    """Let `seconds` pass. Raises Stopped as soon as `stopping` is set."""
    await first_of(clock.sleep(seconds), stopping.wait())
    if stopping.is_set():
        raise Stopped


class Interrupt:
    """Made inside a running event loop, by one run.

    The first signal sets `stopping`: nothing more is sent. After `drain_s`, or at the second
    signal, the workers are cancelled. An error of one worker sets it too, and then the others
    have as long as they need: whoever does not want to wait interrupts.

    Args:
        drain_s: how long requests in flight may take to finish.
        say: tells a person.
    """

    def __init__(self, drain_s: float, say: Callable[[str], None]) -> None:
        self.stopping = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._drain_s = drain_s
        self._say = say
        self._interrupted = False

    async def run(
        self, workers: Iterable[Coroutine[Any, Any, None]], ticker: Coroutine[Any, Any, None]
    ) -> None:
        """Run the workers side by side to their end, and `ticker` as long as they run.

        Raises:
            Exception: the first one of a worker or the ticker, once the other workers have ended.
        """
        ticking = asyncio.ensure_future(ticker)
        self._workers = [asyncio.ensure_future(worker) for worker in workers]
        with self._handled():
            try:
                await self._settled(ticking)
            finally:
                ticking.cancel()
                self._abandon()
                await asyncio.gather(ticking, *self._workers, return_exceptions=True)

    async def _settled(self, ticking: asyncio.Task[None]) -> None:
        """Wait for the workers; at the first error say so, wait for the others and raise it."""
        waiting = asyncio.wait(self._workers, return_when=asyncio.FIRST_EXCEPTION)
        working = asyncio.ensure_future(waiting)
        await asyncio.wait({working, ticking}, return_when=asyncio.FIRST_COMPLETED)
        ended = [task for task in (ticking, *self._workers) if task.done() and not task.cancelled()]
        error = next((e for task in ended if (e := task.exception()) is not None), None)
        if error is None:
            return
        left = [worker for worker in self._workers if not worker.done()]
        if left and not self.stopping.is_set():
            self._say(f"{error}. Waiting for what is in flight (Ctrl-C to leave)")
        self.stopping.set()
        if left:
            await asyncio.wait(left)
        raise error

    @contextmanager
    def _handled(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for sig in _SIGNALS:
            loop.add_signal_handler(sig, self._interrupt, loop)
        try:
            yield
        finally:
            for sig in _SIGNALS:
                loop.remove_signal_handler(sig)

    def _interrupt(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._interrupted:
            self._abandon()
            return
        self._interrupted = True
        self.stopping.set()
        self._say(f"stopping: {self._drain_s:g} s for what is in flight (again to stop at once)")
        loop.call_later(self._drain_s, self._abandon)

    def _abandon(self) -> None:
        for worker in self._workers:
            worker.cancel()
