from __future__ import annotations

import sqlite3
import subprocess
import sys

import pytest

from conserve_sgl.batch.schema import Batch, BatchRecord, FileObject, new_batch_id, new_file_id
from conserve_sgl.batch.server.storage import Storage
from conserve_sgl.batch.server.store import FileInUse, Line, Store
from conserve_sgl.errors import StorageError

NOW = 1000


def a_file(**changes) -> FileObject:
    fields = {"id": new_file_id(), "bytes": 5, "created_at": NOW, "filename": "in.jsonl"}
    return FileObject(**fields | {"purpose": "batch"} | changes)


def a_record(input_file_id: str, **changes) -> BatchRecord:
    batch = Batch(
        id=new_batch_id(),
        endpoint="/v1/completions",
        input_file_id=input_file_id,
        completion_window="1h",
        status="validating",
        created_at=NOW,
        expires_at=NOW + 3600,
    )
    record = BatchRecord(batch=batch, output_id=new_file_id(), error_id=new_file_id())
    return record.with_batch(**changes)


async def upload(store: Store, content: bytes = b"hello", **changes) -> FileObject:
    path = store.new_upload()
    path.write_bytes(content)
    file = a_file(bytes=len(content), **changes)
    await store.add_upload(path, file)
    return file


async def test_a_file_is_kept_and_read_back(store):
    file = await upload(store, b"content")
    assert await store.file(file.id, NOW) == file
    assert store.content(file.id).read_bytes() == b"content"
    assert await store.used_bytes() == 7


async def test_a_file_that_is_not_there(store):
    assert await store.file("file-x", NOW) is None
    assert await store.delete_file("file-x", NOW) is False
    assert await store.files(NOW, limit=5, after="file-x") is None


async def test_a_deleted_file_is_gone_with_its_content(store):
    file = await upload(store)
    assert await store.delete_file(file.id, NOW) is True
    assert await store.file(file.id, NOW) is None
    assert not store.content(file.id).exists()


async def test_an_expired_file_is_not_shown_and_purged(store):
    file = await upload(store, expires_at=NOW + 10)
    assert await store.file(file.id, NOW + 9) == file
    assert await store.file(file.id, NOW + 10) is None
    assert (await store.files(NOW + 10, limit=5)).data == []
    await store.purge(NOW + 9, 0)
    assert store.content(file.id).exists()
    await store.purge(NOW + 10, 0)
    assert not store.content(file.id).exists()


async def test_the_input_of_an_active_batch_stays(store):
    file = await upload(store, expires_at=NOW + 10)
    record = await store.create_batch(a_record(file.id), NOW, None)
    with pytest.raises(FileInUse, match=record.batch.id):
        await store.delete_file(file.id, NOW)
    await store.purge(NOW + 99, 0)
    assert store.content(file.id).exists()
    await store.end_batch(record.with_batch(status="completed"), NOW + 99, [])
    await store.purge(NOW + 99, 0)
    assert not store.content(file.id).exists()


async def test_files_come_in_pages(store):
    files = [await upload(store) for _ in range(5)]
    output = await upload(store, purpose="batch_output")
    newest = [f.id for f in [output, *reversed(files)]]

    async def walk(**kwargs) -> list[str]:
        seen, after = [], None
        while True:
            page = await store.files(NOW, limit=2, after=after, **kwargs)
            seen += [f.id for f in page.data]
            if not page.has_more:
                return seen
            after = seen[-1]

    assert await walk() == newest
    assert await walk(newest_first=False) == newest[::-1]
    assert await walk(purpose="batch") == newest[1:]


async def test_batches_come_in_pages_newest_first(store):
    file = await upload(store)
    ids = [(await store.create_batch(a_record(file.id), NOW, None)).batch.id for _ in range(3)]
    first = await store.batches(limit=2)
    assert ([r.batch.id for r in first.data], first.has_more) == (ids[:0:-1], True)
    rest = await store.batches(limit=2, after=ids[1])
    assert ([r.batch.id for r in rest.data], rest.has_more) == (ids[:1], False)
    assert await store.batches(limit=2, after="batch_x") is None


async def test_a_batch_needs_its_file(store):
    with pytest.raises(LookupError):
        await store.create_batch(a_record("file-x"), NOW, None)
    assert await store.active_batches() == []


async def test_an_idempotency_key_gives_the_same_batch(store):
    file = await upload(store)
    first = await store.create_batch(a_record(file.id), NOW, "key")
    assert await store.create_batch(a_record(file.id), NOW, "key") == first
    assert await store.create_batch(a_record(file.id), NOW, "other") != first
    assert len(await store.active_batches()) == 2


async def test_ending_a_batch_publishes_its_files(store):
    file = await upload(store)
    record = await store.create_batch(a_record(file.id), NOW, None)
    output = a_file(id=record.output_id, purpose="batch_output")
    store.content(record.output_id).write_bytes(b"12345")
    ended = record.with_batch(status="completed", output_file_id=output.id)
    await store.end_batch(ended, NOW, [output])
    assert await store.batch(record.batch.id) == ended
    assert await store.file(output.id, NOW) == output
    assert await store.active_batches() == []
    await store.purge(NOW + 100, NOW + 100)
    assert await store.batch(record.batch.id) is None
    assert await store.file(output.id, NOW) == output


async def test_a_transaction_that_fails_leaves_nothing(store):
    file = await upload(store)
    record = await store.create_batch(a_record(file.id), NOW, None)
    ended = record.with_batch(status="completed")
    with pytest.raises(StorageError, match="UNIQUE"):
        await store.end_batch(ended, NOW, [a_file(id=record.output_id), file])
    assert await store.batch(record.batch.id) == record
    assert await store.file(record.output_id, NOW) is None
    await store.update_batch(record)  # and the next one can begin


async def test_what_a_crash_left_behind_is_removed(storage):
    store = await Store.open(storage)
    file = await upload(store)
    record = await store.create_batch(a_record(file.id), NOW, None)
    store.content(record.output_id).write_bytes(b"so far")
    store.content("file-orphan").write_bytes(b"x")
    half = store.new_upload()
    half.write_bytes(b"x")
    await store.close()

    store = await Store.open(storage)
    assert not half.exists()
    names = {path.name for path in storage.files.iterdir()}
    assert names == {file.id, record.output_id}
    assert await store.active_batches() == [record]
    await store.close()


async def test_a_database_of_another_version_is_left_alone(storage):
    with sqlite3.connect(storage.database) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StorageError, match="format 99"):
        await Store.open(storage)


async def test_something_else_than_a_database_is_left_alone(storage):
    storage.database.write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match=r"batch\.db"):
        await Store.open(storage)


async def test_a_full_disk_is_an_error_and_loses_nothing(storage):
    store = await Store.open(storage)
    file = await upload(store)
    ((pages,),) = await store._db.read("PRAGMA page_count")
    await store._db.read(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match="full"):
        await upload(store, filename="x" * 9000)
    await store._db.read("PRAGMA max_page_count = 100000")
    await upload(store)
    assert len((await store.files(NOW, limit=9)).data) == 2
    assert await store.file(file.id, NOW) == file
    await store.close()


TAKE = """
import sys
from pathlib import Path
from conserve_sgl.batch.server.storage import Storage
Storage(Path(sys.argv[1]))
"""


def test_one_process_has_the_folder(storage):
    def take() -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", TAKE, str(storage.folder)], capture_output=True, text=True
        )

    assert "another server is using" in take().stderr


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot use"):
        Storage(tmp_path / "file" / "storage")


def test_the_folder_is_private(storage):
    assert storage.folder.stat().st_mode & 0o077 == 0


async def test_a_database_of_before_lines_were_marked_goes_on(storage):
    store = await Store.open(storage)
    await store.close()
    with sqlite3.connect(storage.database) as db:
        db.execute("DROP TABLE lines")
    store = await Store.open(storage)
    assert await store.count_deaths() == []
    await store.mark_lines({Line("b", "r0"): True})
    assert await store.count_deaths() == [Line("b", "r0")]
    await store.close()
