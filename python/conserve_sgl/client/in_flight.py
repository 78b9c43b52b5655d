"""How much of a run is in flight at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

from conserve_sgl.client.interrupt import Interrupt, Stopped

__all__ = ["send_all"]

T = TypeVar("T")


async def send_all(
    items: Iterator[T],
    send: Callable[[T], Awaitable[None]],
    *,
    in_flight: int,
    interrupt: Interrupt,
    ticker: Coroutine[Any, Any, None],
) -> None:
    """`send` every one of `items`, in order and so many at a time, and run `ticker` meanwhile.

    Once the run is being stopped no further item is taken.

    Raises:
        Exception: the first one of `send` or the ticker, once what was in flight has ended.
    """

    async def work() -> None:
        for item in items:
            try:
                await send(item)
            except Stopped:
                return
            if interrupt.stopping.is_set():
                return

    await interrupt.run([work() for _ in range(in_flight)], ticker)
