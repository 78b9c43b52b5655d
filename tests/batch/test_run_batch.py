"""`conserve run-batch`."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from batch import fake_engine
from batch.lines import jsonl, request, requests
from conserve_sgl import cli
from conserve_sgl.batch import remote_files
from conserve_sgl.batch.run_batch import RunBatch, run_batch
from conserve_sgl.client.progress import DONE, INTERRUPTED, SOME_FAILED
from conserve_sgl.client.retry import Retry
from conserve_sgl.errors import InputError, JobError

QUICK = Retry(first_delay_s=0.001, max_delay_s=0.01, server_down_s=0.05)


class Folder:
    """The three files of a run."""

    def __init__(self, path: Path) -> None:
        self.input, self.output, self.errors = (path / n for n in ("in", "out", "errors"))

    def run(self, *endpoints: str, content: bytes | None = None, **options) -> int:
        if content is not None:
            self.input.write_bytes(content)
        job = {"input": self.input, "output": self.output, "errors": self.errors} | options
        for name in ("input", "output", "errors"):
            job[name] = str(job[name])
        job |= {"endpoints": list(endpoints)}
        job.setdefault("retry", QUICK)
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


FAILED = '{"object": "response", "status": "failed", "error": {"message": "Generation aborted"}}'


def test_an_answer_that_says_it_failed_is_none(server, folder):
    server.engine.script = {"word 1": [FAILED] * 2, "word 2": [FAILED] * 5}
    assert folder.run(server.url, content=requests(4)) == SOME_FAILED
    assert sorted(folder.lines(folder.output)) == ["r0", "r1", "r3"]
    assert "Generation aborted" in folder.lines(folder.errors)["r2"]["error"]["message"]


def response(name: str) -> dict:
    body = {"model": "m", "input": f"say {name}"}
    return {"custom_id": name, "method": "POST", "url": "/v1/responses", "body": body}


@pytest.mark.parametrize("status", [403, 404, 400])
def test_a_fault_of_one_line_is_that_lines(server, folder, status):
    server.engine.script = {"say b": [(status, {})]}
    content = jsonl(*(request(f"r{i}") for i in range(6)), response("b"), response("c"))
    assert folder.run(server.url, content=content) == SOME_FAILED
    assert len(folder.lines(folder.output)) == 7
    assert folder.lines(folder.errors)["b"]["response"]["status_code"] == status
    assert f"failed: 1 x {status} scripted (b)" in folder.said
    assert "7 of 8 lines are in" in folder.said
    assert folder.run(server.url) == DONE


def test_a_path_that_some_lines_ask_for_is_not_there(start_server, folder, monkeypatch):
    monkeypatch.setattr(fake_engine, "PATHS", fake_engine.PATHS[:3])
    server = start_server()
    content = jsonl(*(request(f"r{i}") for i in range(6)), response("b"))
    assert folder.run(server.url, content=content) == SOME_FAILED
    assert sorted(folder.lines(folder.output)) == [f"r{i}" for i in range(6)]
    assert f"failed: 1 x 404 {server.url} has no /v1/responses" in folder.said


def test_a_server_that_has_no_path_for_any_line_ends_the_run_at_once(server, folder):
    with pytest.raises(JobError, match="has no /v1/chat/completions"):
        folder.run(f"{server.url}/gateway", content=requests(50), max_in_flight=1)
    assert "0 of 50 lines are in" in folder.said
    assert len(folder.lines(folder.errors)) == 1


def test_what_is_in_flight_when_the_run_has_to_end_is_kept(server, folder):
    server.engine.script = {"word 3": [(401, {})]}
    server.engine.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(folder.run, server.url, content=requests(6), max_in_flight=6)
        server.wait_until(lambda: server.engine.active == 5 and "in flight" in folder.said)
        server.engine.gate.set()
        with pytest.raises(JobError, match="401"):
            running.result(60)
    assert sorted(folder.lines(folder.output)) == ["r0", "r1", "r2", "r4", "r5"]
    assert folder.run(server.url) == DONE
    assert set(server.engine.answered.values()) == {1}


def test_an_error_file_is_named_only_when_there_is_one(server, folder):
    assert folder.run(server.url, content=requests(2)) == DONE
    assert str(folder.errors) not in folder.said


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


def test_a_number_that_is_none_is_refused(server, folder):
    bad = jsonl(request("b")).replace(b'"model"', b'"temperature": 1e999, "model"')
    with pytest.raises(InputError, match="body is not JSON: Number out of range") as caught:
        folder.run(server.url, content=jsonl(request("a"), bad))
    assert caught.value.line == 2
    assert server.engine.requests == []


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


@pytest.mark.parametrize("name", ["output", "errors"])
@pytest.mark.parametrize(
    ("place", "said"),
    [("folder", "Is a directory"), ("nowhere/file", "its folder is not there"), ("file/x", "N")],
)
def test_files_that_cannot_be_written_are_found_before_anything_is_sent(
    server, folder, tmp_path, name, place, said
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=f"{place}: cannot be written: {said}"):
        folder.run(server.url, content=requests(1), **{name: tmp_path / place})
    assert server.engine.requests == []


def test_it_does_not_mix_two_batches(server, folder):
    folder.run(server.url, content=requests(3))
    before = folder.output.read_bytes()
    with pytest.raises(InputError, match="not of"):
        folder.run(server.url, content=jsonl(request("other")))
    assert folder.output.read_bytes() == before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("request_timeout_s", value) for value in (-1, 0, float("nan"), float("inf"), 1e300)),
        *(("priority", value) for value in (10**23, -(10**23), 2**31)),
    ],
)
def test_an_option_that_would_fail_every_line_is_refused(server, folder, option, value):
    with pytest.raises(InputError, match=f"--{option.replace('_', '-')}: must be"):
        folder.run(server.url, content=requests(1), **{option: value})
    assert server.engine.requests == []


@pytest.mark.parametrize(
    "endpoint",
    [
        "localhost:30000",
        "http://localhost:30000/v1",
        "http://x:99999999",
        "http://[::1",
    ],
)
def test_an_endpoint_is_a_base_url(folder, endpoint):
    with pytest.raises(InputError, match="--endpoint"):
        folder.run(endpoint, content=requests(1))


# ------------------------------------------------------------------ elsewhere


class Shelf:
    """An HTTP server that keeps files: GET and PUT."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[int] = []
        shelf = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = shelf.files.get(self.path)
                self._answer(404 if content is None else 200, content or b"")

            def do_PUT(self) -> None:
                content = self.rfile.read(int(self.headers["content-length"]))
                if not shelf.faults or shelf.faults[0] == 200:
                    shelf.files[self.path] = content
                self._answer(200, b"")

            def _answer(self, status: int, content: bytes) -> None:
                status = shelf.faults.pop(0) if shelf.faults else status
                self.send_response(status)
                if status == 307:
                    self.send_header("location", "/elsewhere")
                content = content if status == 200 else b""
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def output(self) -> bytes:
        return self.files["/out/answers.jsonl?sig=secret"]

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shelf = Shelf()
    yield shelf
    shelf.close()


def test_a_batch_from_a_url_to_a_url(server, folder, shelf):
    shelf.files["/in/questions.jsonl?sig=secret"] = requests(5)
    server.engine.script = {"word 1": [(400, {})]}
    places = {
        "input": f"{shelf.url}/in/questions.jsonl?sig=secret",
        "output": f"{shelf.url}/out/answers.jsonl?sig=secret",
        "errors": f"{shelf.url}/out/faults.jsonl?sig=secret",
    }
    assert folder.run(server.url, **places) == SOME_FAILED
    stored = {line["custom_id"] for line in map(json.loads, shelf.output().splitlines())}
    assert stored == {"r0", "r2", "r3", "r4"}
    assert b'"custom_id":"r1"' in shelf.files["/out/faults.jsonl?sig=secret"]
    assert "secret" not in folder.said
    assert f"answers.jsonl is at {shelf.url}/out/answers.jsonl" in folder.said
    names = {headers["x-sgl-conserve-job"] for _, headers, _ in server.engine.requests}
    assert names == {"questions"}

    assert folder.run(server.url, **places) == DONE  # goes on from what is in the folder
    assert len(server.engine.requests) == 6
    assert len(shelf.output().splitlines()) == 5


def test_passing_faults_of_the_other_side_are_waited_for(server, folder, shelf):
    shelf.files["/in.jsonl"] = requests(2)
    shelf.faults = [503, 500]
    assert folder.run(server.url, input=f"{shelf.url}/in.jsonl") == DONE
    shelf.faults = [429, 200, 503]
    assert folder.run(server.url, input=f"{shelf.url}/in.jsonl", output=f"{shelf.url}/a") == DONE
    assert b"r1" in shelf.files["/a"]


@pytest.mark.parametrize("url", ["{}/none.jsonl?sig=secret", "http://127.0.0.1:9/a", "http://[::1"])
def test_an_input_that_is_not_there_is_told_before_anything_is_sent(server, folder, shelf, url):
    with pytest.raises(InputError, match="cannot be read: ") as caught:
        folder.run(server.url, input=url.format(shelf.url))
    assert "secret" not in str(caught.value)
    assert server.engine.requests == []
    assert not folder.output.exists()


@pytest.mark.parametrize("status", [403, 307])
def test_results_that_are_not_taken_are_kept(server, folder, shelf, tmp_path, status):
    folder.input.write_bytes(requests(3))
    output = f"{shelf.url}/answers.jsonl"
    shelf.faults = [status]
    with pytest.raises(JobError, match=f"does not take the results: {status} .*answers.jsonl"):
        folder.run(server.url, output=output)
    assert len(folder.lines(tmp_path / "answers.jsonl")) == 3
    assert folder.run(server.url, output=output) == DONE
    assert shelf.files["/answers.jsonl"] == (tmp_path / "answers.jsonl").read_bytes()
    assert len(server.engine.requests) == 3


def test_a_faulty_line_of_a_url_is_named_with_it(server, folder, shelf):
    shelf.files["/in.jsonl?sig=secret"] = jsonl(request("a"), b"{}\n", b"{\n")
    with pytest.raises(InputError, match=rf"^{shelf.url}/in.jsonl:2: ") as caught:
        folder.run(server.url, input=f"{shelf.url}/in.jsonl?sig=secret")
    assert f"{shelf.url}/in.jsonl:3: " in folder.said
    assert "secret" not in folder.said + str(caught.value)


def test_standard_input_and_pipes(server, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(requests(3))))
    assert folder.run(server.url, input="-") == DONE
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(pipe.write_bytes, requests(4))
        assert folder.run(server.url, input=pipe) == DONE
        writing.result()
    assert sorted(folder.lines(folder.output)) == ["r0", "r1", "r2", "r3"]
    assert len(server.engine.requests) == 4


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://h/a/b.jsonl", "b.jsonl"),
        ("https://h/a%20b.jsonl?x=/y", "a b.jsonl"),
        *(
            (f"http://h{path}", "batch.jsonl")
            for path in ("", "/", "/..", "/%2fetc", "/a%0a", "?a/b")
        ),
    ],
)
def test_the_name_of_a_urls_file_is_one_of_this_folder(url, name):
    assert remote_files.local_copy(url) == Path(name)


def test_what_is_shown_of_a_url_holds_no_secret():
    assert remote_files.shown("https://me:pw@h:8443/a/b?sig=1#x") == "https://h:8443/a/b"
    assert "pw" not in remote_files.shown("http://me:pw@[::1/a?b")


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


def test_the_command_from_standard_input_to_a_url(server, folder, shelf):
    arguments = ["run-batch", "-i", "-", "-o", f"{shelf.url}/a.jsonl", f"--endpoint={server.url}"]
    server.engine.script = {"word 1": [(400, {})]}
    result = CliRunner().invoke(cli.app, arguments, input=requests(3))
    assert result.exit_code == SOME_FAILED
    assert len(shelf.files["/a.jsonl"].splitlines()) == 2
    assert list(folder.lines(Path("a.errors.jsonl"))) == ["r1"]


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
