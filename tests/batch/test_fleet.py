"""Batches of a server whose lines go out to several."""

from __future__ import annotations

import logging
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import openai
import pytest

from batch.fake_engine import FakeServer
from batch.lines import requests
from batch.test_deaths import rows
from batch.test_processor import create, ended, lines
from conserve_sgl.bench.systems.server import free_port

BUSY = (429, {"retry-after": "999999"})


class Fleet:
    """A server with batches among two others, which have none.

    Attributes:
        server, client: the one with batches, and the official client of it.
        others: the others.
    """

    def __init__(
        self, start: Callable[[], FakeServer], others: list[FakeServer], connect: Callable
    ) -> None:
        self.others = others
        self.server = start()
        self.client: openai.OpenAI = connect(self.server)

    @property
    def all(self) -> list[FakeServer]:
        return [self.server, *self.others]

    def answered(self) -> Counter[str]:
        return sum((s.engine.answered for s in self.all), Counter())

    def active(self) -> int:
        return sum(s.engine.active for s in self.all)

    def hold_answers(self) -> None:
        for server in self.all:
            server.engine.gate.clear()

    def answer(self) -> None:
        for server in self.all:
            server.engine.gate.set()


@pytest.fixture
def start_other() -> Iterator[Callable[..., FakeServer]]:
    """Starts a server without batches."""
    servers: list[FakeServer] = []

    def start(**options) -> FakeServer:
        servers.append(FakeServer(None, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.engine.gate.set()
        server.stop()


@pytest.fixture
def start_fleet(start_server, start_other, connect) -> Callable[..., Fleet]:
    def start(*, own: bool = True, **options) -> Fleet:
        others = [start_other() for _ in range(2)]
        port = free_port()
        urls = [server.url for server in others]
        if own:
            urls.insert(0, f"http://127.0.0.1:{port}")
        return Fleet(lambda: start_server(port=port, endpoints=urls, **options), others, connect)

    return start


def test_every_line_is_answered_once_by_one_of_them(start_fleet):
    fleet = start_fleet(max_in_flight=24)
    fleet.hold_answers()
    batch = create(fleet.client, requests(90))
    fleet.server.wait_until(lambda: fleet.active() == 24)
    assert [s.engine.active for s in fleet.all] == [8, 8, 8]
    fleet.answer()
    batch = ended(fleet.server, fleet.client, batch, "completed")
    output = lines(fleet.client, batch.output_file_id)
    texts = {name: line["response"]["body"]["choices"][0]["text"] for name, line in output.items()}
    assert texts == {f"r{i}": f"WORD {i}" for i in range(90)}
    assert fleet.answered() == {f"word {i}": 1 for i in range(90)}
    assert batch.usage.total_tokens == 270


def test_each_is_told_what_it_gets(start_fleet):
    fleet = start_fleet()
    batch = ended(
        fleet.server, fleet.client, create(fleet.client, requests(30), window="1h"), "completed"
    )
    for server in fleet.others:
        for _, headers, body in server.engine.requests:
            assert headers["x-sgl-conserve-class"] == "offline"
            assert headers["x-sgl-conserve-job"] == batch.id
            assert 3000 < float(headers["x-sgl-conserve-deadline-s"]) <= 3600
            assert (body["service_tier"], body["priority"]) == ("flex", -1)


def test_the_servers_own_key_goes_to_all(start_server, start_other, connect):
    others = [start_other(api_key="secret") for _ in range(2)]
    server = start_server(api_key="secret", endpoints=[other.url for other in others])
    client = connect(server, api_key="secret")
    batch = ended(server, client, create(client, requests(9)), "completed")
    assert batch.request_counts.completed == 9
    assert server.engine.requests == []  # it is not among them


def test_a_line_that_is_refused_is_that_servers_answer(start_fleet):
    fleet = start_fleet()
    for server in fleet.all:
        server.engine.script = {"word 1": [(400, {})]}
    batch = ended(fleet.server, fleet.client, create(fleet.client, requests(3)), "completed")
    (line,) = lines(fleet.client, batch.error_file_id).values()
    assert (line["custom_id"], line["response"]["status_code"]) == ("r1", 400)
    assert batch.request_counts.to_dict() == {"total": 3, "completed": 2, "failed": 1}


def test_no_more_are_in_flight_than_may_be(start_fleet):
    fleet = start_fleet(max_in_flight=7)
    fleet.hold_answers()
    for _ in range(2):
        create(fleet.client, requests(20))
    fleet.server.wait_until(lambda: fleet.active() == 7)
    fleet.server.wait_until(lambda: fleet.server.clock.now_s % 30 < 1)
    assert fleet.active() == 7
    fleet.answer()


def test_a_server_that_dies_leaves_its_lines_to_the_others(start_fleet):
    fleet = start_fleet(max_in_flight=12)
    dies = fleet.others[0]
    dies.engine.gate.clear()
    batch = create(fleet.client, requests(60))
    fleet.server.wait_until(lambda: dies.engine.active >= 3)
    dies.die()
    batch = ended(fleet.server, fleet.client, batch, "completed")
    assert len(lines(fleet.client, batch.output_file_id)) == 60
    assert fleet.answered() == {f"word {i}": 1 for i in range(60)}
    assert dies.engine.answered.total() == 0


def test_a_batch_waits_for_servers_that_are_all_away(start_server, start_other, connect):
    port = free_port()
    server = start_server(endpoints=[f"http://127.0.0.1:{port}"])
    client = connect(server)
    batch = create(client, requests(5))
    server.wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress", step_s=0.0)
    began_s = server.clock.now_s
    # A run of `conserve run-batch` would have ended.
    server.wait_until(lambda: server.clock.now_s > began_s + 1000, step_s=30.0)
    assert client.batches.retrieve(batch.id).status == "in_progress"
    start_other(port=port)
    assert ended(server, client, batch, "completed").request_counts.completed == 5


def test_one_that_wants_another_key_gets_nothing_and_fails_nothing(
    start_server, start_other, connect, caplog
):
    good, other = start_other(), start_other(api_key="another")
    caplog.set_level(logging.INFO)
    server = start_server(endpoints=[good.url, other.url])
    client = connect(server)
    batch = ended(server, client, create(client, requests(20)), "completed")
    assert batch.request_counts.completed == 20
    assert good.engine.answered.total() == 20
    assert "it wants another API key" in caplog.text


def test_the_workers_of_a_gateway_that_comes_late(start_server, start_other, connect):
    others = [start_other() for _ in range(2)]
    port = free_port()
    server = start_server(discover=f"http://127.0.0.1:{port}")
    client = connect(server)
    batch = create(client, requests(40))
    server.wait_until(lambda: client.batches.retrieve(batch.id).status == "in_progress")
    gateway = start_other(port=port)
    gateway.engine.workers = [other.url for other in others]
    ended(server, client, batch, "completed")
    assert sum(other.engine.answered.total() for other in others) == 40
    assert min(other.engine.answered.total() for other in others) > 0


# ------------------------------------------------------------------- marks


def test_only_lines_in_its_own_hands_are_marked(start_fleet, tmp_path):
    fleet = start_fleet(max_in_flight=12)
    fleet.hold_answers()
    batch = create(fleet.client, requests(12))
    fleet.server.wait_until(lambda: fleet.active() == 12)
    own = set(fleet.server.engine.order)
    assert 0 < len(own) < 12
    marked = {name.replace("r", "word ") for name, _, _ in rows(tmp_path / "storage")}
    assert marked == own
    fleet.answer()
    ended(fleet.server, fleet.client, batch, "completed")
    assert rows(tmp_path / "storage") == []


def test_what_may_have_ended_it_goes_to_it_alone(start_fleet, start_server, connect, tmp_path):
    fleet = start_fleet(max_in_flight=12)
    fleet.hold_answers()
    batch = create(fleet.client, requests(12))
    fleet.server.wait_until(lambda: fleet.active() == 12)
    own = set(fleet.server.engine.order)
    folder = shutil.copytree(tmp_path / "storage", tmp_path / "copy")
    fleet.answer()

    for other in fleet.others:
        other.engine.order.clear()
    again = start_server(folder=folder, endpoints=[other.url for other in fleet.others])
    ended(again, connect(again), batch, "completed")
    assert set(again.engine.order) == own
    assert not own & {text for other in fleet.others for text in other.engine.order}


# --------------------------------------------------------------- its endings


def test_a_batch_that_is_cancelled_gives_up_what_others_have(start_fleet):
    fleet = start_fleet(max_in_flight=12)
    fleet.hold_answers()
    batch = create(fleet.client, requests(40))
    fleet.server.wait_until(lambda: fleet.active() == 12)
    sent = sum(len(s.engine.requests) for s in fleet.all)
    fleet.client.batches.cancel(batch.id)
    ended(fleet.server, fleet.client, batch, "cancelled")
    fleet.server.wait_until(lambda: sum(s.engine.gone for s in fleet.all) == 12)
    assert sum(len(s.engine.requests) for s in fleet.all) == sent


def test_what_is_answered_before_the_end_of_a_cancelled_batch_counts(start_fleet):
    fleet = start_fleet(max_in_flight=12)
    fleet.hold_answers()
    batch = create(fleet.client, requests(40))
    fleet.server.wait_until(lambda: fleet.active() == 12)
    fleet.client.batches.cancel(batch.id)
    fleet.answer()
    batch = ended(fleet.server, fleet.client, batch, "cancelled", step_s=0.0)
    assert batch.request_counts.completed == fleet.answered().total() == 12


def test_a_batch_whose_window_ends_gives_up_what_others_have(start_fleet):
    fleet = start_fleet(max_in_flight=12)
    fleet.others[0].engine.gate.clear()
    batch = create(fleet.client, requests(40), window="1h")
    fleet.server.wait_until(
        lambda: fleet.answered().total() + fleet.others[0].engine.active == 40, step_s=0.0
    )
    held = fleet.others[0].engine.active
    assert held > 0
    batch = ended(fleet.server, fleet.client, batch, "expired", step_s=60.0)
    assert batch.request_counts.completed == 40 - held
    errors = lines(fleet.client, batch.error_file_id)
    assert {line["error"]["code"] for line in errors.values()} == {"batch_expired"}
    fleet.server.wait_until(lambda: fleet.others[0].engine.gone == held)


def test_a_batch_that_waits_for_room_ends_at_once_when_it_is_cancelled(start_fleet):
    fleet = start_fleet()
    for server in fleet.all:
        server.engine.always = BUSY
    batch = create(fleet.client, requests(5))
    fleet.server.wait_until(lambda: sum(len(s.engine.requests) for s in fleet.all) >= 3)
    fleet.client.batches.cancel(batch.id)
    ended(fleet.server, fleet.client, batch, "cancelled", step_s=0.0)


def test_a_server_that_stops_sends_nothing_more_and_the_next_one_goes_on(
    start_fleet, start_server, connect
):
    fleet = start_fleet(max_in_flight=6)
    fleet.hold_answers()
    batch = create(fleet.client, requests(30))
    fleet.server.wait_until(lambda: fleet.active() == 6)
    fleet.server.draining.set()
    fleet.server.wait_until(lambda: sum(s.engine.gone for s in fleet.all) == 6)
    assert sum(len(s.engine.requests) for s in fleet.all) == 6
    fleet.server.stop()
    fleet.answer()

    again = start_server(endpoints=[other.url for other in fleet.others])
    ended(again, connect(again), batch, "completed")
    assert fleet.answered() == {f"word {i}": 1 for i in range(30)}


def test_while_batches_are_held_nothing_goes_to_any_server(start_fleet):
    fleet = start_fleet(max_in_flight=12)
    fleet.hold_answers()
    batch = create(fleet.client, requests(40))
    fleet.server.wait_until(lambda: fleet.active() == 12)
    for other in fleet.others:  # lines that wait for a server when batches are held
        other.engine.always = BUSY
    held = threading.Event()
    fleet.server.engine.loop.call_soon_threadsafe(
        lambda: (fleet.server.batches.hold(True), held.set())
    )
    held.wait()
    sent = sum(len(s.engine.requests) for s in fleet.all)
    fleet.answer()
    fleet.server.wait_until(lambda: fleet.answered().total() == 12)
    began_s = fleet.server.clock.now_s
    fleet.server.wait_until(lambda: fleet.server.clock.now_s > began_s + 60)
    assert sum(len(s.engine.requests) for s in fleet.all) == sent
    for other in fleet.others:
        other.engine.always = None
    fleet.server.hold(False)
    ended(fleet.server, fleet.client, batch, "completed")
    assert fleet.answered() == {f"word {i}": 1 for i in range(40)}
