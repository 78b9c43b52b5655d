"""The SQLite database of a server's batches: its tables, reading, and transactions."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiosqlite

from conserve_sgl.errors import StorageError

__all__ = ["Database"]

_VERSION = 1
_TABLES = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    expires_at INTEGER,
    object TEXT NOT NULL
);
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    ended_at INTEGER,
    input_file_id TEXT NOT NULL,
    idempotency_key TEXT UNIQUE,
    record TEXT NOT NULL
);
"""
# Not in every database of this version, and passed over by a conserve that does not know it.
_LINES = """
CREATE TABLE IF NOT EXISTS lines (
    batch_id TEXT NOT NULL,
    custom_id TEXT NOT NULL,
    in_flight INTEGER NOT NULL,
    deaths INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (batch_id, custom_id)
) WITHOUT ROWID;
"""


class Database:
    """An open database; one per process, and its only writer. Made by `open`.

    Raises (as every method):
        StorageError: it cannot be read or written.
    """

    def __init__(self, path: Path, connection: aiosqlite.Connection) -> None:
        self._path = path
        self._connection = connection
        self._writer = asyncio.Lock()

    @classmethod
    async def open(cls, path: Path) -> Database:
        """Open it, and make it if it is new."""
        try:
            # A commit survives a power cut (`writing`), and reading never waits (WAL).
            connection = await aiosqlite.connect(path, isolation_level=None)
            try:
                await _prepare(connection, path)
            except BaseException:
                await connection.close()
                raise
        except sqlite3.Error as e:
            raise StorageError(f"cannot use {path}: {e}") from e
        return cls(path, connection)

    async def close(self) -> None:
        """Close it."""
        await self._connection.close()

    async def read(self, query: str, *values: Any) -> list[Any]:
        """The rows that `query` gives."""
        try:
            return list(await self._connection.execute_fetchall(query, values))
        except sqlite3.Error as e:
            raise StorageError(f"cannot read {self._path}: {e}") from e

    @asynccontextmanager
    async def writing(self, *, durable: bool = True) -> AsyncIterator[aiosqlite.Connection]:
        """A transaction: all of it or nothing.

        Args:
            durable: whether it survives a power cut; all survive the end of the process.
        """
        db = self._connection
        async with self._writer:
            try:
                await db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                await db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                    await db.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):  # it may have been committed, or not begun
                        await db.execute("ROLLBACK")
                    raise
            except sqlite3.Error as e:
                raise StorageError(f"cannot write {self._path}: {e}") from e


async def _prepare(db: aiosqlite.Connection, path: Path) -> None:
    await db.execute("PRAGMA journal_mode = WAL")
    await db.execute("PRAGMA synchronous = FULL")
    ((version,),) = await db.execute_fetchall("PRAGMA user_version")
    if version == 0:
        await db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {_VERSION}; COMMIT;")
    elif version != _VERSION:
        raise StorageError(f"{path} was made by another version of conserve (format {version})")
    await db.execute(_LINES)
