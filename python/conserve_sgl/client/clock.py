"""Time, and waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Any

__all__ = ["Clock", "first_of"]


class Clock:
    """Time and sleep of this process; tests bring their own."""

    def monotonic_s(self) -> float:
        """Seconds that only go forward."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def deadline_s(self, left_s: float | None) -> float | None:
        """`left_s` from now, on `monotonic_s`; None where there is no deadline."""
        return None if left_s is None else self.monotonic_s() + left_s

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` pass."""
        await asyncio.sleep(seconds)


async def first_of(*awaitables: Awaitable[Any]) -> None:
    """Wait until one of them is done, and cancel the others."""
    tasks = [asyncio.ensure_future(a) for a in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
