"""`conserve run-batch`."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from batch.lines import jsonl, request, requests
from conserve_sgl import cli
from conserve_sgl.batch.client import DONE, INTERRUPTED, SOME_FAILED, RunBatch, run_batch
from conserve_sgl.errors import InputError, JobError
from conserve_sgl.jobs.schema import Retry

QUICK = Retry(first_delay_s=0.001, max_delay_s=0.01, server_down_s=0.05)


class Folder:
    """The three files of a run."""

    def __init__(self, path: Path) -> None:
        self.input, self.output, self.errors = (path / n for n in ("in", "out", "errors"))

    def run(self, *endpoints: str, content: bytes | None = None, **options) -> int:
        if content is not None:
            self.input.write_bytes(content)
        job = {"input": self.input, "output": self.output, "errors": self.errors}
        job |= {"endpoints": list(endpoints), "retry": QUICK} | options
        self.console = Console(file=io.StringIO(), width=200)
        return run_batch(RunBatch(**job), console=self.console)

    @property
    def said(self) -> str:
        return self.console.file.getvalue()

    def lines(self, path: Path) -> dict[str, dict]:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({line["custom_id"] for line in found}) == len(found)
        return {line["custom_id"]: line for line in found}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_every_line_is_answered_once(server, folder):
    assert folder.run(server.url, content=requests(30)) == DONE
    lines = folder.lines(folder.output)
    assert sorted(lines) == sorted(f"r{i}" for i in range(30))
    assert lines["r7"]["response"]["body"]["choices"][0]["text"] == "WORD 7"
    assert lines["r7"]["error"] is None
    assert set(server.engine.answered.values()) == {1}
    assert not folder.errors.exists()
    assert "30 of 30 lines are in" in folder.said


def test_every_request_is_tagged_for_servers_and_for_gateways(server, folder):
    folder.run(server.url, content=requests(1, body={"service_tier": "default"}))
    ((_, headers, body),) = server.engine.requests
    assert headers["x-sgl-conserve-class"] == "offline"
    assert (body["service_tier"], body["priority"]) == ("flex", -1)


@pytest.mark.parametrize(("priority", "sent"), [(1, 1), (None, "none")])
def test_the_priority_is_the_users(server, folder, priority, sent):
    folder.run(server.url, content=requests(1), priority=priority)
    assert server.engine.requests[0][2].get("priority", "none") == sent


def test_it_goes_on_where_it_stopped(server, folder):
    folder.run(server.url, content=requests(10))
    lines = folder.output.read_bytes().splitlines(keepends=True)
    folder.output.write_bytes(b"".join(lines[:6]) + lines[6][:25])  # torn by a crash
    server.engine.requests.clear()
    assert folder.run(server.url) == DONE
    assert len(server.engine.requests) == 4
    assert len(folder.lines(folder.output)) == 10
    assert folder.output.read_bytes().startswith(b"".join(lines[:6]))
    assert folder.run(server.url) == DONE
    assert len(server.engine.requests) == 4


def test_failed_lines_are_told_and_tried_again_the_next_time(server, folder):
    server.engine.script = {
        "word 1": [(400, {})],
        "word 2": [(500, {})] * 5,
        "word 3": ["abort"] * 5,
    }
    assert folder.run(server.url, content=requests(5)) == SOME_FAILED
    errors = folder.lines(folder.errors)
    assert sorted(errors) == ["r1", "r2", "r3"]
    assert errors["r1"]["response"]["status_code"] == 400
    assert errors["r1"]["response"]["body"] == {"error": {"message": "scripted"}}
    assert errors["r2"]["response"]["status_code"] == 500
    assert errors["r3"]["error"]["code"] == "request_failed"
    assert sorted(folder.lines(folder.output)) == ["r0", "r4"]
    assert folder.run(server.url) == DONE
    assert len(folder.lines(folder.output)) == 5
    assert not folder.errors.exists()


def test_a_busy_server_is_waited_for(server, folder):
    server.engine.script = {"word 1": [(429, {}), (503, {}), (429, {"retry-after": "0"})] * 5}
    assert folder.run(server.url, content=requests(3)) == DONE


def test_several_endpoints_share_the_work(start_server, tmp_path, folder):
    one = start_server()
    two = start_server(folder=tmp_path / "second")
    assert folder.run(one.url, two.url, content=requests(40), max_in_flight=4) == DONE
    assert len(one.engine.answered) + len(two.engine.answered) == 40
    assert min(len(one.engine.answered), len(two.engine.answered)) > 5


def test_one_endpoint_that_is_down_is_done_without(server, folder):
    assert folder.run("http://127.0.0.1:9", server.url, content=requests(10)) == DONE


def test_when_no_endpoint_answers_it_ends(folder):
    with pytest.raises(JobError, match="no answer"):
        folder.run("http://127.0.0.1:9", content=requests(2))


def test_the_key_is_sent(start_server, folder):
    server = start_server(api_key="secret")
    with pytest.raises(JobError, match="401"):
        folder.run(server.url, content=requests(2))
    assert folder.run(server.url, api_key="secret") == DONE


def test_lines_of_several_endpoints_may_be_in_one_file(server, folder):
    other = {"url": "/v1/completions", "body": {"model": "m", "prompt": "b"}}
    content = jsonl(request("a"), request("b") | other)
    assert folder.run(server.url, content=content) == DONE
    assert {path for path, *_ in server.engine.requests} == {
        "/v1/chat/completions",
        "/v1/completions",
    }


def test_a_faulty_file_is_refused_whole(server, folder):
    content = jsonl(request("a"), b"{nope\n", request("a"))
    with pytest.raises(InputError) as caught:
        folder.run(server.url, content=content)
    assert (caught.value.path, caught.value.line) == (folder.input, 2)
    assert "in:3: custom_id: 'a' was on an earlier line" in folder.said
    assert server.engine.requests == []
    assert not folder.output.exists()


def test_a_stream_is_no_input(folder):
    os.mkfifo(folder.input)
    with pytest.raises(InputError, match="must be a regular file"):
        folder.run("http://127.0.0.1:9")


def test_a_file_that_is_not_there(server, folder):
    with pytest.raises(InputError, match="cannot be read"):
        folder.run(server.url)
    assert not folder.output.exists()


@pytest.mark.parametrize("same", ["output", "errors"])
def test_it_does_not_write_over_its_input(server, folder, same):
    with pytest.raises(InputError, match="three different files"):
        folder.run(server.url, content=requests(1), **{same: folder.input})
    assert folder.input.read_bytes() == requests(1)


@pytest.mark.parametrize("name", ["output", "errors"])
def test_it_does_not_write_over_other_peoples_files(server, folder, name):
    path = getattr(folder, name)
    path.write_text("dear diary")
    with pytest.raises(InputError, match="no batch made it"):
        folder.run(server.url, content=requests(1))
    assert path.read_text() == "dear diary"


def test_it_does_not_mix_two_batches(server, folder):
    folder.run(server.url, content=requests(3))
    before = folder.output.read_bytes()
    with pytest.raises(InputError, match="not of"):
        folder.run(server.url, content=jsonl(request("other")))
    assert folder.output.read_bytes() == before


@pytest.mark.parametrize("endpoint", ["localhost:30000", "http://localhost:30000/v1"])
def test_an_endpoint_is_a_base_url(folder, endpoint):
    with pytest.raises(InputError, match="--endpoint"):
        folder.run(endpoint, content=requests(1))


# ---------------------------------------------------------------- the command


def command(folder: Folder, url: str, *more: str) -> list[str]:
    arguments = ["run-batch", "-i", str(folder.input), "-o", str(folder.output)]
    return [*arguments, f"--endpoint={url}", *more]


def test_the_command(server, folder):
    folder.input.write_bytes(requests(3))
    server.engine.script = {"word 1": [(400, {})]}
    result = CliRunner().invoke(cli.app, command(folder, server.url))
    assert result.exit_code == SOME_FAILED
    assert list(folder.lines(folder.output.with_suffix(".errors.jsonl"))) == ["r1"]
    result = CliRunner().invoke(cli.app, command(folder, server.url, "--max-in-flight=1"))
    assert result.exit_code == DONE


@pytest.fixture
def start(checkout, folder):
    """Starts the command in a process of its own."""
    processes = []

    def start(url: str) -> subprocess.Popen:
        argv = [
            sys.executable,
            "-m",
            "conserve_sgl.cli",
            *command(folder, url, "--max-in-flight=4"),
        ]
        env = os.environ | {"PYTHONPATH": str(checkout / "python")}
        process = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_what_is_in_flight_finish(server, folder, start, sent):
    folder.input.write_bytes(requests(50))
    server.engine.gate.clear()
    process = start(server.url)
    server.wait_until(lambda: server.engine.active == 4)
    process.send_signal(sent)
    assert any("stopping" in line for line in process.stderr)
    server.engine.gate.set()
    assert process.wait(30) == INTERRUPTED
    assert len(folder.lines(folder.output)) == 4
    assert folder.run(server.url) == DONE
    assert set(server.engine.answered.values()) == {1}


def test_after_a_kill_it_loses_and_repeats_nothing(server, folder, start):
    folder.input.write_bytes(requests(300))
    process = start(server.url)
    server.wait_until(lambda: len(server.engine.answered) > 40)
    process.kill()
    process.wait(30)
    finished = len(folder.output.read_bytes().splitlines())
    assert folder.run(server.url) == DONE
    assert len(folder.lines(folder.output)) == 300
    again = sum(server.engine.answered.values()) - 300
    assert 0 <= again <= 4 + 1  # in flight, and a line that was torn
    assert finished < 300


def test_two_runs_do_not_write_one_file(server, folder, start):
    folder.input.write_bytes(requests(10))
    server.engine.gate.clear()
    start(server.url)
    server.wait_until(lambda: server.engine.active == 4)
    with pytest.raises(JobError, match="another run"):
        folder.run(server.url)
    server.engine.gate.set()
