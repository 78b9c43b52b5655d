"""Ctrl-C and SIGTERM, as a run takes them: let what is in flight finish, then leave."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Interrupt"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Made inside a running event loop, by one run.

    The first signal sets `stopping`: nothing more is sent. After `drain_s`, or at the second
    signal, the workers are cancelled.

    Args:
        drain_s: how long requests in flight may take to finish.
        say: tells a person.
    """

    def __init__(self, drain_s: float, say: Callable[[str], None]) -> None:
        self.stopping = asyncio.Event()
        self._workers: list[asyncio.Task[None]] = []
        self._drain_s = drain_s
        self._say = say

    async def run(
        self, workers: Iterable[Coroutine[Any, Any, None]], ticker: Coroutine[Any, Any, None]
    ) -> None:
        """Run the workers side by side to their end, and `ticker` as long as they run.

        Raises:
            Exception: the first one of a worker or the ticker; the others were cancelled.
        """
        with self._handled():
            try:
                async with asyncio.TaskGroup() as group:
                    ticking = group.create_task(ticker)
                    self._workers = [group.create_task(worker) for worker in workers]
                    await asyncio.wait(self._workers)
                    ticking.cancel()
            except ExceptionGroup as e:
                raise e.exceptions[0] from e

    @contextmanager
    def _handled(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for sig in _SIGNALS:
            loop.add_signal_handler(sig, self._interrupted, loop)
        try:
            yield
        finally:
            for sig in _SIGNALS:
                loop.remove_signal_handler(sig)

    def _interrupted(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.stopping.is_set():
            self._abandon()
            return
        self.stopping.set()
        self._say(f"stopping: {self._drain_s:g} s for what is in flight (again to stop at once)")
        loop.call_later(self._drain_s, self._abandon)

    def _abandon(self) -> None:
        for worker in self._workers:
            worker.cancel()
