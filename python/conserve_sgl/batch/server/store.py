"""Files and batches: what exists is in a database, the contents of files are beside it.

A file's content is there before its row is, and goes after it, so a crash can only leave content
that no row names; opening the store removes it. Which lines of a batch are done is not in the
database: `results.py` says why. Which are in the engine's hands is, and at how many deaths of a
server they were there: `marks.py`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import aiosqlite
import msgspec

from conserve_sgl.batch.schema import ACTIVE, BatchRecord, FileObject, new_file_id
from conserve_sgl.batch.server.database import Database
from conserve_sgl.batch.server.storage import Storage
from conserve_sgl.errors import StorageError

__all__ = ["FileInUse", "Line", "Page", "Store"]

T = TypeVar("T")

_IS_ACTIVE = f"status IN ({', '.join(repr(status) for status in ACTIVE)})"


class FileInUse(StorageError):
    """The file is the input of a batch that is not over."""


class Page(NamedTuple):
    """One page of a list, and whether there is more after it."""

    data: list[Any]
    has_more: bool


class Line(NamedTuple):
    """A line of a batch."""

    batch_id: str
    custom_id: str


class Store:
    """The open store; one per process, and its only writer. Made by `open`."""

    def __init__(self, storage: Storage, database: Database) -> None:
        self._storage = storage
        self._db = database

    @classmethod
    async def open(cls, storage: Storage) -> Store:
        """Open it, make it if it is new, and remove what a crash left behind.

        Raises:
            StorageError: the database cannot be used.
        """
        store = cls(storage, await Database.open(storage.database))
        await store._sweep()
        return store

    async def close(self) -> None:
        """Close the database; the folder stays taken."""
        await self._db.close()

    # ---------------------------------------------------------------- files

    def content(self, file_id: str) -> Path:
        """Where the content of a file is; `file_id` is one of ours, not what a client sent."""
        return self._storage.files / file_id

    def new_upload(self) -> Path:
        """A path for content on its way in, on the same file system."""
        return self._storage.uploads / new_file_id()

    async def used_bytes(self) -> int:
        """Bytes of all files, without the results of active batches."""
        ((used,),) = await self._db.read("SELECT coalesce(sum(bytes), 0) FROM files")
        return used

    async def add_upload(self, upload: Path, file: FileObject) -> None:
        """Take the uploaded content in as `file`."""

        def move() -> None:
            _sync(upload)
            upload.replace(self.content(file.id))
            _sync(self._storage.files)

        await _on_disk(move)
        async with self._db.writing() as db:
            await _insert_file(db, file)

    async def file(self, file_id: str, now: int) -> FileObject | None:
        """The file with this id, unless it has expired."""
        rows = await self._db.read(
            "SELECT object FROM files WHERE id = ? AND (expires_at IS NULL OR expires_at > ?)",
            file_id,
            now,
        )
        return _decode(rows[0][0], FileObject) if rows else None

    async def files(
        self,
        now: int,
        *,
        limit: int,
        after: str | None = None,
        newest_first: bool = True,
        purpose: str | None = None,
    ) -> Page | None:
        """A page of files; None when there is no file `after`."""
        where = "(expires_at IS NULL OR expires_at > ?)"
        values: list[Any] = [now]
        if purpose is not None:
            where += " AND purpose = ?"
            values.append(purpose)
        return await self._page(
            "files", "object", FileObject, where, values, limit, after, newest_first
        )

    async def delete_file(self, file_id: str, now: int) -> bool:
        """Delete the file and its content; False when there is none.

        Raises:
            FileInUse: an active batch reads it.
        """
        async with self._db.writing() as db:
            if await self.file(file_id, now) is None:
                return False
            in_use = await self._db.read(
                f"SELECT id FROM batches WHERE input_file_id = ? AND {_IS_ACTIVE}", file_id
            )
            if in_use:
                raise FileInUse(f"{file_id} is the input of {in_use[0][0]}, which is not over")
            await db.execute("DELETE FROM files WHERE id = ?", (file_id,))
        await asyncio.to_thread(self.content(file_id).unlink, missing_ok=True)
        return True

    # -------------------------------------------------------------- batches

    async def create_batch(self, record: BatchRecord, now: int, key: str | None) -> BatchRecord:
        """Keep a new batch, or give the one that was created with the same idempotency `key`.

        Raises:
            LookupError: the input file is not there.
        """
        async with self._db.writing() as db:
            if key is not None:
                query = "SELECT record FROM batches WHERE idempotency_key = ?"
                if rows := await self._db.read(query, key):
                    return _decode(rows[0][0], BatchRecord)
            batch = record.batch
            if await self.file(batch.input_file_id, now) is None:
                raise LookupError(batch.input_file_id)
            await db.execute(
                "INSERT INTO batches (id, status, input_file_id, idempotency_key, record)"
                " VALUES (?, ?, ?, ?, ?)",
                (batch.id, batch.status, batch.input_file_id, key, _encode(record)),
            )
        return record

    async def batch(self, batch_id: str) -> BatchRecord | None:
        """The batch with this id."""
        rows = await self._db.read("SELECT record FROM batches WHERE id = ?", batch_id)
        return _decode(rows[0][0], BatchRecord) if rows else None

    async def batches(self, *, limit: int, after: str | None = None) -> Page | None:
        """A page of batches, newest first; None when there is no batch `after`."""
        return await self._page("batches", "record", BatchRecord, "TRUE", [], limit, after, True)

    async def active_batches(self) -> list[BatchRecord]:
        """The batches that are not over, oldest first."""
        rows = await self._db.read(f"SELECT record FROM batches WHERE {_IS_ACTIVE} ORDER BY seq")
        return [_decode(record, BatchRecord) for (record,) in rows]

    async def update_batch(self, record: BatchRecord) -> None:
        """Replace what is kept of an active batch."""
        async with self._db.writing() as db:
            await _update(db, record, None)

    async def end_batch(self, record: BatchRecord, now: int, files: list[FileObject]) -> None:
        """Replace what is kept of a batch that is over, and publish its result files."""
        async with self._db.writing() as db:
            for file in files:
                await _insert_file(db, file)
            await _update(db, record, now)
            await db.execute("DELETE FROM lines WHERE batch_id = ?", (record.batch.id,))

    # ------------------------------------------- lines in the engine's hands

    async def mark_lines(self, changes: Mapping[Line, bool]) -> None:
        """Note which lines are in flight from now on, and which are no more.

        Does not wait for the disk.
        """
        begun = [line for line, in_flight in changes.items() if in_flight]
        ended = [line for line, in_flight in changes.items() if not in_flight]
        async with self._db.writing(durable=False) as db:
            await db.executemany(
                "INSERT INTO lines (batch_id, custom_id, in_flight) VALUES (?, ?, TRUE)"
                " ON CONFLICT (batch_id, custom_id) DO UPDATE SET in_flight = TRUE",
                begun,
            )
            await db.executemany(
                "UPDATE lines SET in_flight = FALSE WHERE batch_id = ? AND custom_id = ?", ended
            )
            await db.executemany(
                "DELETE FROM lines WHERE batch_id = ? AND custom_id = ? AND deaths = 0"
                " AND NOT in_flight",
                ended,
            )

    async def forget_marks(self) -> None:
        """No line is in flight."""
        async with self._db.writing() as db:
            await db.execute("UPDATE lines SET in_flight = FALSE")
            await db.execute("DELETE FROM lines WHERE deaths = 0")

    async def count_deaths(self) -> list[Line]:
        """A server died, if any line is marked: count that to each, and give them."""
        async with self._db.writing() as db:
            lines = await self._db.read("SELECT batch_id, custom_id FROM lines WHERE in_flight")
            await db.execute(
                "UPDATE lines SET deaths = deaths + 1, in_flight = FALSE WHERE in_flight"
            )
        return [Line(*line) for line in lines]

    async def deaths(self, batch_id: str) -> dict[str, int]:
        """At how many deaths each line of a batch was in flight, by custom_id; only those."""
        query = "SELECT custom_id, deaths FROM lines WHERE batch_id = ? AND deaths > 0"
        return dict(await self._db.read(query, batch_id))

    # ---------------------------------------------------------------- purging

    async def purge(self, now: int, ended_before: int) -> None:
        """Delete files that have expired and batches that ended before that time."""
        async with self._db.writing() as db:
            gone = await self._db.read(
                "DELETE FROM files WHERE expires_at <= ? AND id NOT IN"
                f" (SELECT input_file_id FROM batches WHERE {_IS_ACTIVE}) RETURNING id",
                now,
            )
            await db.execute("DELETE FROM batches WHERE ended_at < ?", (ended_before,))
        for (file_id,) in gone:
            await asyncio.to_thread(self.content(file_id).unlink, missing_ok=True)

    # -------------------------------------------------------------- helpers

    async def _page(
        self,
        table: str,
        column: str,
        type_: type,
        where: str,
        values: list[Any],
        limit: int,
        after: str | None,
        newest_first: bool,
    ) -> Page | None:
        if after is not None:
            found = await self._db.read(f"SELECT seq FROM {table} WHERE id = ?", after)
            if not found:
                return None
            where += f" AND seq {'<' if newest_first else '>'} ?"
            values = [*values, found[0][0]]
        order = "DESC" if newest_first else "ASC"
        rows = await self._db.read(
            f"SELECT {column} FROM {table} WHERE {where} ORDER BY seq {order} LIMIT ?",
            *values,
            limit + 1,
        )
        return Page([_decode(text, type_) for (text,) in rows[:limit]], len(rows) > limit)

    async def _sweep(self) -> None:
        """Remove content that no row names: what a crash left behind."""
        kept = {file_id for (file_id,) in await self._db.read("SELECT id FROM files")}
        for record in await self.active_batches():
            kept |= {record.output_id, record.error_id}

        def sweep() -> None:
            for path in self._storage.files.iterdir():
                if path.name not in kept:
                    path.unlink()
            for path in self._storage.uploads.iterdir():
                path.unlink()

        await _on_disk(sweep)


async def _insert_file(db: aiosqlite.Connection, file: FileObject) -> None:
    await db.execute(
        "INSERT INTO files (id, purpose, bytes, expires_at, object) VALUES (?, ?, ?, ?, ?)",
        (file.id, file.purpose, file.bytes, file.expires_at, _encode(file)),
    )


async def _update(db: aiosqlite.Connection, record: BatchRecord, ended_at: int | None) -> None:
    await db.execute(
        "UPDATE batches SET status = ?, ended_at = ?, record = ? WHERE id = ?",
        (record.batch.status, ended_at, _encode(record), record.batch.id),
    )


async def _on_disk(do: Callable[[], T]) -> T:
    try:
        return await asyncio.to_thread(do)
    except OSError as e:
        raise StorageError(f"cannot write {e.filename or 'a file'}: {e.strerror or e}") from e


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _encode(record: msgspec.Struct) -> str:
    return msgspec.json.encode(record).decode()


def _decode(text: str, type_: type[T]) -> T:
    return msgspec.json.decode(text, type=type_)
