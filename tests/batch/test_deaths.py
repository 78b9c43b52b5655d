"""Lines that may have ended the server: marked, sent alone, given up."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import time
from pathlib import Path

import pytest

from batch.lines import requests
from batch.test_processor import create, ended, lines
from conserve_sgl.batch.server.marks import Marks
from conserve_sgl.batch.server.store import Line, Store
from conserve_sgl.errors import StorageError


def rows(folder: Path) -> list[tuple[str, int, int]]:
    """Which lines the database knows of, whether they are in flight, and their deaths."""
    with sqlite3.connect(folder / "batch.db") as db:
        return db.execute("SELECT custom_id, in_flight, deaths FROM lines ORDER BY 1").fetchall()


@pytest.fixture
def die(tmp_path):
    """Gives the folder as a server that dies at this moment leaves it."""
    copies = iter(tmp_path / f"copy{i}" for i in range(9))

    def die(folder: Path = tmp_path / "storage") -> Path:
        return Path(shutil.copytree(folder, next(copies)))

    return die


def died_with(start_server, connect, die, *, n: int, in_flight: int):
    """A batch of n lines, and the folder of a server that died with so many in flight."""
    server = start_server(max_in_flight=in_flight)
    server.engine.gate.clear()
    batch = create(connect(server), requests(n))
    server.wait_until(lambda: server.engine.active == in_flight)
    return batch, die()


def held(start_server, folder: Path):
    """A server that goes on with `folder`, whose engine answers nothing yet."""
    server = start_server(folder=folder, max_in_flight=4, start="held")
    server.engine.gate.clear()
    server.hold(False)
    server.wait_until(lambda: server.engine.active)
    return server


def test_what_was_in_flight_at_a_death_is_sent_alone_and_first(start_server, connect, die):
    batch, folder = died_with(start_server, connect, die, n=10, in_flight=4)
    suspects = {f"word {name[1:]}" for name, _, _ in rows(folder)}
    assert len(suspects) == 4

    server = held(start_server, folder)
    time.sleep(0.1)  # in which the others are not sent, however slow this machine is
    assert len(server.engine.requests) == 1
    server.engine.gate.set()
    ended(server, connect(server), batch, "completed")
    alone = server.engine.events[:8]
    assert alone[::2] == [("begins", text) for _, text in alone[1::2]]
    assert {text for _, text in alone} == suspects
    assert set(server.engine.answered.values()) == {1}
    assert rows(folder) == []


def test_what_was_in_flight_at_two_deaths_is_given_up(start_server, connect, die):
    batch, folder = died_with(start_server, connect, die, n=6, in_flight=2)
    second = held(start_server, folder)
    ((_, alone),) = second.engine.events
    name = alone.replace("word ", "r")
    again = die(folder)
    assert (name, 1, 1) in rows(again)

    third = start_server(folder=again)
    client = connect(third)
    batch = ended(third, client, batch, "completed")
    assert batch.request_counts.to_dict() == {"total": 6, "completed": 5, "failed": 1}
    (line,) = lines(client, batch.error_file_id).values()
    assert (line["custom_id"], line["response"]) == (name, None)
    assert line["error"]["message"] == "the server died 2 times while it ran"
    assert alone not in third.engine.answered


def test_how_many_deaths_are_too_many_is_configured(start_server, connect, die):
    batch, folder = died_with(start_server, connect, die, n=3, in_flight=2)
    server = start_server(folder=folder, max_deaths=1)
    client = connect(server)
    batch = ended(server, client, batch, "completed")
    errors = lines(client, batch.error_file_id)
    assert {line["error"]["message"] for line in errors.values()} == {
        "the server died 1 time while it ran"
    }
    assert len(errors) == 2


def test_a_stop_is_no_death(start_server, connect, tmp_path):
    server = start_server(max_in_flight=2)
    server.engine.gate.clear()
    create(connect(server), requests(6))
    server.wait_until(lambda: server.engine.active == 2)
    server.stop()
    assert rows(tmp_path / "storage") == []


def test_the_end_of_a_server_that_was_told_to_stop_is_no_death(
    start_server, connect, die, tmp_path
):
    """SGLang may end in the moment after SIGTERM, with lines in flight."""
    server = start_server(max_in_flight=2)
    server.engine.gate.clear()
    batch = create(connect(server), requests(6))
    server.wait_until(lambda: server.engine.active == 2)
    server.engine.loop.call_soon_threadsafe(server.batches.leave)
    while rows(tmp_path / "storage"):  # the clock stands: nothing else than `leave` does it
        time.sleep(0.01)
    folder = die()

    again = start_server(folder=folder)
    ended(again, connect(again), batch, "completed")
    assert rows(folder) == []


def test_a_line_that_was_turned_away_is_not_in_flight(start_server, connect, tmp_path):
    server = start_server(max_in_flight=2)
    server.engine.always = (429, {"retry-after": "999999"})
    create(connect(server), requests(2))
    server.wait_until(lambda: len(server.engine.requests) == 2)
    server.wait_until(lambda: rows(tmp_path / "storage") == [], step_s=2.0)


def test_held_from_the_start_a_server_takes_batches_and_sends_none(start_server, connect):
    server = start_server(start="held")
    client = connect(server)
    batch = create(client, requests(3))
    server.wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress")
    time.sleep(0.05)
    assert server.engine.requests == []
    server.hold(False)
    ended(server, client, batch, "completed")


def test_a_batch_that_is_held_can_be_cancelled(start_server, connect):
    server = start_server(start="held")
    client = connect(server)
    batch = create(client, requests(3))
    server.wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress")
    client.batches.cancel(batch.id)
    ended(server, client, batch, "cancelled")
    assert server.engine.requests == []


def test_nothing_is_sent_that_cannot_be_marked(server, client, monkeypatch):
    faults = [StorageError("database or disk is full")] * 3
    mark = Store.mark_lines

    async def mark_if_there_is_room(self, changes) -> None:
        if faults:
            assert server.engine.requests == []
            raise faults.pop()
        await mark(self, changes)

    monkeypatch.setattr(Store, "mark_lines", mark_if_there_is_room)
    ended(server, client, create(client, requests(3)), "completed")
    assert faults == []


# --------------------------------------------------------------------- the marks


async def test_marks_that_come_during_a_write_are_one_write():
    class SlowStore:
        def __init__(self) -> None:
            self.writes: list[dict[Line, bool]] = []
            self.turn = asyncio.Event()

        async def mark_lines(self, changes: dict[Line, bool]) -> None:
            await self.turn.wait()
            self.writes.append(dict(changes))

    store = SlowStore()
    marks = Marks(store)
    begun = [asyncio.create_task(marks.begin(Line("b", f"r{i}"))) for i in range(100)]
    await asyncio.sleep(0)
    assert not any(task.done() for task in begun)
    store.turn.set()
    await asyncio.gather(*begun)
    assert sum(len(write) for write in store.writes) == 100
    assert len(store.writes) <= 2


async def test_a_mark_that_was_not_written_is_written_later(store, monkeypatch):
    marks, line = Marks(store), Line("b", "r0")
    real = store.mark_lines

    async def full(_changes) -> None:
        raise StorageError("full")

    monkeypatch.setattr(store, "mark_lines", full)
    with pytest.raises(StorageError):
        await marks.begin(line)
    monkeypatch.setattr(store, "mark_lines", real)
    await marks.write()
    assert await store.count_deaths() == [line]
    assert await store.deaths("b") == {"r0": 1}


async def test_deaths_add_up_and_a_line_that_ends_keeps_them(store):
    line, other = Line("b", "r0"), Line("b", "r1")
    for deaths in (1, 2):
        await store.mark_lines({line: True, other: deaths == 2})
        assert await store.count_deaths() == [line, other][:deaths]
    await store.mark_lines({line: False, other: False, Line("c", "never marked"): False})
    assert await store.count_deaths() == []
    assert await store.deaths("b") == {"r0": 2, "r1": 1}
    assert await store.deaths("c") == {}
