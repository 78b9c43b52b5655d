"""The disk of a server's batches, which may be slow, or full for a while: they wait for it.

What they do with it is done in threads of their own: a slow disk must not keep SGLang's from
tokenizing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from conserve_sgl.client.clock import Clock, first_of
from conserve_sgl.errors import JobError, StorageError

__all__ = ["Disk", "Left"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_S = 5.0


class Left(Exception):
    """The server stops; the next one goes on."""


class Disk:
    """Runs what reads and writes, and does it again where the disk does not take it.

    Args:
        leaving: once it is set, what the disk does not take is given up.
    """

    def __init__(self, leaving: asyncio.Event, clock: Clock) -> None:
        self._leaving = leaving
        self._clock = clock
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="conserve-batch")

    async def run(self, do: Callable[..., T], *arguments: Any) -> T:
        """What `do` returns, called in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, do, *arguments)

    async def patiently(self, what: str, do: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """What `do` returns once the disk takes it; until then `what` waits, as the log says once.

        Raises:
            Left: the server stops.
        """
        complained = False
        while True:
            try:
                return await do(*arguments)
            except (StorageError, JobError, OSError) as e:
                if not complained:
                    logger.error("%s waits for the disk: %s", what, e)
                complained = True
            await first_of(self._clock.sleep(RETRY_S), self._leaving.wait())
            if self._leaving.is_set():
                raise Left

    def close(self) -> None:
        """Wait for what is under way, and end the threads."""
        self._threads.shutdown()
