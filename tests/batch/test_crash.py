"""A server that is killed, again and again, at moments that nothing in it chose."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from batch.fake_engine import FakeServer
from batch.lines import CHAT, jsonl, request, requests
from conserve_sgl.bench.systems.server import ManagedProcess, free_port

LINES = 400
ENGINE = Path(__file__).with_name("fake_engine.py")


class Killable:
    """A server of its own, started anew after each kill."""

    def __init__(self, folder: Path, checkout: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.answered = folder / "answered.txt"
        self.answered.touch()
        # These kills are no line's fault, and may find the same one in flight several times.
        self.configure(max_deaths=100)
        self._env = {
            "PYTHONPATH": os.pathsep.join([str(checkout / d) for d in ("python", "tests")])
        }
        self._process: ManagedProcess | None = None

    def configure(self, **batch: Any) -> None:
        batch |= {"storage_dir": str(self.folder / "storage"), "max_in_flight": 8}
        (self.folder / "conserve.yaml").write_text(yaml.safe_dump({"batch": batch}))

    def start(self) -> None:
        self.launch()
        self.until(self._answers)

    def launch(self) -> None:
        """As `start`, but it may die before it answers."""
        argv = [sys.executable, str(ENGINE), str(self.port)]
        argv += [str(self.folder / "conserve.yaml"), str(self.answered)]
        self._process = ManagedProcess(argv, log_path=self.folder / "log", env=self._env)
        self._process.start()
        self.http = httpx.Client(base_url=f"{self.url}/v1")

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
            self.http.close()
            self._process = None

    def kill_in(self, seconds: float) -> None:
        """Kill it while this process does something else."""
        threading.Timer(seconds, os.killpg, (self._process.pid, signal.SIGKILL)).start()

    def until(self, condition):
        deadline_s = time.monotonic() + 60
        while not (value := condition()):
            assert self._process.returncode is None, self._process.log_tail()
            assert time.monotonic() < deadline_s, self._process.log_tail()
            time.sleep(0.01)
        return value

    def has_died_or_batch_is_over(self, batch_id: str) -> bool:
        """Whether it has died; False once the batch is over."""
        while self._process.returncode is None:
            with suppress(httpx.TransportError):
                if self.batch(batch_id)["status"] == "completed":
                    return False
            time.sleep(0.01)
        return True

    def _answers(self) -> bool:
        try:
            return self.http.get("/batches").status_code == 200
        except httpx.TransportError:
            return False

    def answers(self) -> Counter[str]:
        """How often each text was answered, over all lives of the server."""
        return Counter(self.answered.read_text().splitlines())

    def upload(self, content: bytes) -> str:
        files = {"file": ("in.jsonl", content)}
        answer = self.http.post("/files", files=files, data={"purpose": "batch"})
        return answer.raise_for_status().json()["id"]

    def create(self, file_id: str) -> str:
        asked = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        return self.http.post("/batches", json=asked).raise_for_status().json()["id"]

    def batch(self, batch_id: str) -> dict:
        return self.http.get(f"/batches/{batch_id}").raise_for_status().json()


@pytest.fixture
def killable(tmp_path: Path, checkout: Path):
    server = Killable(tmp_path, checkout)
    yield server
    server.kill()


def kill_three_times(killable: Killable, answers: Callable[[], Counter[str]]) -> list[dict]:
    """A batch of LINES while the server is killed; the lines of its output."""
    rng = random.Random(7)
    killable.start()
    batch_id = killable.create(killable.upload(requests(LINES)))
    for _ in range(3):
        aim = answers().total() + rng.randrange(LINES // 5)
        killable.until(
            lambda aim=aim: (
                answers().total() >= aim or killable.batch(batch_id)["status"] == "completed"
            )
        )
        killable.kill()
        killable.start()

    def completed():
        batch = killable.batch(batch_id)
        assert batch["status"] not in ("failed", "expired", "cancelled"), batch
        return batch if batch["status"] == "completed" else None

    batch = killable.until(completed)
    assert batch["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
    assert batch["usage"]["total_tokens"] == 3 * LINES
    content = killable.http.get(f"/files/{batch['output_file_id']}/content").text
    lines = [json.loads(line) for line in content.splitlines()]
    assert sorted(line["custom_id"] for line in lines) == sorted(f"r{i}" for i in range(LINES))
    return lines


def test_killed_at_any_moment_it_loses_and_repeats_no_line(killable):
    for line in kill_three_times(killable, killable.answers):
        number = line["custom_id"].removeprefix("r")
        assert line["response"]["body"]["choices"][0]["text"] == f"WORD {number}"
    # What was in flight when it was killed was sent again, and nothing else was.
    again = killable.answers().total() - LINES
    assert 0 <= again <= 8 * 3


def test_killed_at_any_moment_it_loses_and_repeats_no_line_of_those_at_others(killable):
    others = [FakeServer(None) for _ in range(2)]
    killable.configure(max_deaths=100, endpoints=[killable.url, *(o.url for o in others)])

    def answers() -> Counter[str]:
        return sum((other.engine.answered for other in others), killable.answers())

    try:
        kill_three_times(killable, answers)
    finally:
        for other in others:
            other.stop()
    assert 0 <= answers().total() - LINES <= 8 * 3
    assert 0 < killable.answers().total() < answers().total()


def test_a_line_that_ends_the_server_ends_two_of_them_and_no_more(killable):
    content = requests(20) + jsonl(request("deadly", "end the server"))
    killable.configure()  # two deaths are the default
    killable.start()
    batch_id = killable.create(killable.upload(content))
    deaths = 0
    while killable.has_died_or_batch_is_over(batch_id):
        deaths += 1
        killable.kill()
        killable.launch()
    assert deaths == 2
    batch = killable.batch(batch_id)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 21, "completed": 20, "failed": 1}
    (line,) = killable.http.get(f"/files/{batch['error_file_id']}/content").text.splitlines()
    assert json.loads(line)["custom_id"] == "deadly"
    error = {"code": "server_died", "message": "the server died 2 times while it ran"}
    assert json.loads(line)["error"] == error


def test_killed_while_it_takes_files_and_batches_in(killable):
    """Whatever was answered is there; whatever was not is there whole or not at all."""
    rng = random.Random(3)
    content = requests(30)
    acknowledged: list[str] = []
    for _ in range(2):
        killable.start()
        acknowledged.append(killable.create(killable.upload(content)))
        killable.kill_in(rng.uniform(0.0, 0.05))
        with suppress(httpx.TransportError):
            while True:
                acknowledged.append(killable.create(killable.upload(content)))
        killable.kill()

    killable.start()
    killable.until(
        lambda: (
            {b["status"] for b in killable.http.get("/batches?limit=100").json()["data"]}
            <= {"completed"}
        )
    )
    batches = {b["id"]: b for b in killable.http.get("/batches?limit=100").json()["data"]}
    assert set(acknowledged) <= set(batches)
    files = {f["id"]: f for f in killable.http.get("/files").json()["data"]}
    storage = killable.folder / "storage"
    assert {path.name for path in (storage / "files").iterdir()} == set(files)
    assert list((storage / "uploads").iterdir()) == []
    for file in files.values():
        assert (storage / "files" / file["id"]).stat().st_size == file["bytes"]
    for batch in batches.values():
        assert batch["request_counts"]["completed"] == 30
