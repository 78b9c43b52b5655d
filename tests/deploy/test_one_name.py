"""A name that stands for several servers, for `conserve run-batch` where no gateway is."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from typer.testing import CliRunner

from batch.fake_engine import FakeEngine
from conserve_sgl import cli

NAME = "conserve-servers.test"
ADDRESSES = ("127.0.0.1", "127.0.0.2")
LINES = 200
IN_FLIGHT = 16


class Replica:
    """uvicorn in a thread, at one address of the name, with an engine that is not there."""

    def __init__(self, listening: socket.socket) -> None:
        self.engine = FakeEngine()
        self._server = uvicorn.Server(uvicorn.Config(self.engine.app, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, args=([listening],))
        self._thread.start()

    def end(self) -> None:
        self._server.should_exit = True

    def stop(self) -> None:
        self.end()
        self._thread.join()


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[Replica]]]:
    """The name's base URL, and the servers behind it."""
    sockets = [socket.create_server((ADDRESSES[0], 0))]
    port = sockets[0].getsockname()[1]
    sockets += [socket.create_server((address, port)) for address in ADDRESSES[1:]]
    look_up = socket.getaddrinfo

    def headless(host: str, *args: object, **kwargs: object) -> list[tuple]:
        hosts = ADDRESSES if host == NAME else (host,)
        return [found for each in hosts for found in look_up(each, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", headless)
    found = [Replica(listening) for listening in sockets]
    yield f"http://{NAME}:{port}", found
    for replica in found:
        replica.stop()


def run_batch(folder: Path, url: str) -> list[str]:
    """Run a batch over `url`; the custom_ids of its output."""
    line = {"method": "POST", "url": "/v1/completions"}
    texts = [f"line {number}" for number in range(LINES)]
    rows = [line | {"custom_id": t, "body": {"model": "m", "prompt": t}} for t in texts]
    questions, answers = folder / "questions.jsonl", folder / "answers.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["-i", str(questions), "-o", str(answers)]
    servers = ["--endpoint", url, "--max-in-flight", str(IN_FLIGHT)]
    done = CliRunner().invoke(cli.app, ["run-batch", *files, *servers])
    assert done.exit_code == 0, done.output
    return sorted(json.loads(row)["custom_id"] for row in answers.read_text().splitlines())


def test_every_server_of_the_name_gets_its_part(replicas, tmp_path):
    url, both = replicas
    assert run_batch(tmp_path, url) == sorted(f"line {number}" for number in range(LINES))
    parts = [replica.engine.answered.total() for replica in both]
    assert sum(parts) == LINES
    assert min(parts) >= IN_FLIGHT // 4  # its share of the connections, once each at the least


def test_one_that_ends_while_the_batch_runs_leaves_its_part_to_the_other(replicas, tmp_path):
    url, (first, second) = replicas

    def end_at_the_twentieth(_text: str) -> None:
        if second.engine.answered.total() == 20:
            second.engine.always = (503, {"Retry-After": "0"})  # as a server that ends does
            second.end()

    second.engine.on_answer = end_at_the_twentieth
    assert run_batch(tmp_path, url) == sorted(f"line {number}" for number in range(LINES))
    assert 20 <= second.engine.answered.total() <= 20 + IN_FLIGHT
    assert first.engine.answered.total() >= LINES - 20 - IN_FLIGHT
