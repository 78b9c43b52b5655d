"""Which lines the engine has in hand, in the store before it has them.

A line may end the server: by a fault of the engine's, or by the memory that it takes. Whatever is
marked when a server starts was in hand when the one before it died (`Store.count_deaths`), and is
sent alone from then on; what has been in hand at too many deaths is not sent again.

A write takes all the marks that came while the one before it was under way, so there is about one
for every turn of the disk and not one for every line. They survive the death of the process, and
need not survive a power cut, which is no line's fault: nothing waits for the disk.
"""

from __future__ import annotations

import asyncio

from conserve_sgl.batch.server.store import Line, Store

__all__ = ["Marks"]


class Marks:
    """The marks of one server.

    Args:
        store: keeps them.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._changes: dict[Line, bool] = {}
        self._writing = asyncio.Lock()
        self._closed = False

    async def begin(self, line: Line) -> None:
        """Mark it; returns once the mark is in the store.

        Raises:
            StorageError: it is not; the line must not be sent.
        """
        self._changes[line] = True
        await self.write()

    def end(self, line: Line) -> None:
        """It is out of the engine's hands; `write`, or the next `begin`, tells the store."""
        self._changes[line] = False

    async def write(self) -> None:
        """Tell the store what it does not know.

        Raises:
            StorageError: it did not take it; the next write tries again.
        """
        async with self._writing:
            changes, self._changes = self._changes, {}
            if not changes or self._closed:
                return
            try:
                await self._store.mark_lines(changes)
            except BaseException:
                self._changes = changes | self._changes
                raise

    async def close(self) -> None:
        """The server is told to stop: what happens to a line from here on is no death of its.

        Raises:
            StorageError: the store did not take it.
        """
        async with self._writing:
            self._closed = True
            await self._store.forget_marks()
