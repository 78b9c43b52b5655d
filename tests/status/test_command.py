"""`conserve status` against small HTTP servers that say what they are told."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from conserve_sgl.cli import app
from conserve_sgl.errors import InputError
from conserve_sgl.status.command import watch
from conserve_sgl.status.fetch import Seen
from conserve_sgl.status.record import BatchLine, HostKv, Snapshot
from conserve_sgl.status.recording import read_recording
from conserve_sgl.status.screen import span
from status.examples import JOB, KV, OFFLINE, RECORD, SERVER, changed, record_of

CHECKOUT = Path(__file__).resolve().parent.parent.parent
GONE = "http://127.0.0.1:9"

Answer = tuple[int, Any]


class Server(ThreadingHTTPServer):
    """Answers by path; `asked` has the queries of `/conserve/status`, `keys` what came with all."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status: Callable[[dict[str, int]], Answer] = lambda _query: (200, RECORD)
        self.info: Answer = (404, {})
        self.asked: list[dict[str, int]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.server.keys.append(self.headers["authorization"])
        if url.path == "/conserve/status":
            query = {name: int(values[0]) for name, values in parse_qs(url.query).items()}
            self.server.asked.append(query)
            status, body = self.server.status(query)
        else:
            assert url.path == "/server_info"
            status, body = self.server.info
        content = body if isinstance(body, bytes) else msgspec.json.encode(body)
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def run(*options: str):
    return CliRunner().invoke(app, ["status", *options])


def keeps(*seqs: int, **fields: object) -> Callable[[dict[str, int]], Answer]:
    """A server that keeps these steps, and answers as ours does."""

    def answer(query: dict[str, int]) -> Answer:
        wanted = [seq for seq in seqs if seq >= query.get("since", 0)]
        most = query.get("steps", 0 if "since" not in query else len(wanted))
        wanted = wanted[len(wanted) - min(most, len(wanted)) :]
        record = record_of(*wanted, **fields)
        return 200, changed(record, next_step=max(seqs, default=-1) + 1)

    return answer


# ------------------------------------------------------------------------ one look


def test_it_shows_the_sentence_and_the_numbers(server):
    host = HostKv(total=1000, used=420, pinned=60)
    server.status = lambda _query: (200, changed(RECORD, kv=changed(KV, host=host)))
    result = run(server.url)
    assert result.exit_code == 0
    for text in (
        "The rows leave no more time.",
        "14,000 tokens/s, 70% of 20,000 alone; 40 run, 8 sit out, 144 wait",
        "(the oldest for 31 min), 3 will be late; 9,129 done",
        "TTFT                54.2 ms  158 ms     500 ms   98.0%      412",
        "online 10%, offline 40% (25% checkpointed), cached 30%, free 20%; host 42% of 1,000",
        "211 preemptions, 77 yields, 5,120 rows sat out",
        "180,000 tokens were found again, 9,100 computed again",
        "ttft 500ms, tpot 25ms, yield_ms 5; offline run, batches run",
    ):
        assert text in result.output
    assert re.search(r"nightly +100 +40 +5,200 +67 min +77 min", result.output)
    assert server.asked == [{"steps": 1000}]


def test_a_batch_s_job_shows_how_far_the_batch_is(server):
    batch = BatchLine(
        id="nightly",
        status="in_progress",
        total=50_000,
        completed=11_990,
        failed=10,
        created_at_s=1.0,
        expires_at_s=2.0,
    )
    server.status = lambda _query: (200, changed(RECORD, batches=(batch,), more_jobs=7))
    output = run(server.url).output
    assert "12,000 of 50,000" in output
    assert "and 7 more" in output


def test_steps_are_summed_up(server):
    server.status = keeps(*range(100))
    assert "the last 100 steps, 2 s: offline rows 100%" in run(server.url).output


def test_what_nobody_knows_yet_is_a_dash(server):
    offline = changed(OFFLINE, tokens_per_s=None, alone_tokens_per_s=None)
    job = changed(JOB, name="", done_at_s=None, deadline_at_s=4000.0)
    server.status = lambda _query: (200, changed(RECORD, offline=offline, jobs=(job,)))
    output = run(server.url).output
    assert "offline: - tokens/s;" in output
    assert re.search(r"\(no name\) .* 17 min ago +-", output)


def test_text_of_a_client_is_shown_as_it_is(server):
    job = changed(JOB, name="[red]a[/red] [bold")
    server.status = lambda _query: (200, changed(RECORD, jobs=(job,)))
    assert "[red]a[/red] [bold" in run(server.url).output


def test_many_servers_are_a_table_with_a_sentence_each(server):
    with Server() as other:
        Thread(target=other.serve_forever, args=[0.01], daemon=True).start()
        other.status = lambda _query: (404, {})
        other.info = (200, {"internal_states": [{}]})
        result = run(server.url, GONE, other.url)
        other.shutdown()
    assert result.exit_code == 1
    assert re.search(rf"{server.url} +158 ms +158 ms +12 +40 +144 +14,000 +70%", result.output)
    assert f"{server.url}: The rows leave no more time." in result.output
    assert f"{GONE}/conserve/status: Cannot connect" in result.output
    assert f"{other.url}: an SGLang server without conserve" in result.output


def test_a_stock_server_is_shown_as_one_and_is_no_failure(server):
    server.status, server.info = lambda _query: (404, {}), (200, {"internal_states": [{}]})
    result = run(server.url)
    assert result.exit_code == 0
    why = "an SGLang server without conserve, or with an older one"
    assert result.output == f"{server.url}: {why}\n"


@pytest.mark.parametrize("info", [{}, [], {"internal_states": []}, b"tea"])
def test_a_server_that_says_something_else_is_no_server_of_ours(server, info):
    server.status, server.info = lambda _query: (404, {}), (200, info)
    assert "without conserve" in run(server.url).output


def test_without_status_enabled_the_record_is_in_the_server_s_state(server):
    record = msgspec.to_builtins(changed(RECORD, has_steps=False))
    server.status = lambda _query: (404, {})
    server.info = (200, {"internal_states": [{"conserve": {"status": record}}]})
    output = run(server.url).output
    assert "The rows leave no more time." in output
    assert "latencies need `status: {enabled: true}`" in output


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ((401, {}), "401 Unauthorized; give --api-key"),
        ((500, {}), "500 Internal Server Error"),
        ((200, b"tea"), "no record: "),
        ((200, {"version": 1}), "no record: "),
        ((200, {"version": 99}), "a record of version 99; this one reads 1"),
    ],
)
def test_a_server_that_cannot_be_read_is_named_with_the_reason(server, answer, reason):
    server.status = lambda _query: answer
    result = run(server.url)
    assert result.exit_code == 1
    assert result.output.startswith(server.url)
    assert reason in result.output


def test_fields_that_came_later_are_skipped(server):
    later = msgspec.to_builtins(RECORD) | {"weather": "fine"}
    server.status = lambda _query: (200, later)
    assert run(server.url).exit_code == 0


def test_the_key_goes_along(server, monkeypatch):
    monkeypatch.setenv("CONSERVE_API_KEY", "secret")
    assert run(server.url).exit_code == 0
    assert server.keys == ["Bearer secret"]


def test_json_is_a_line_for_each_server(server):
    result = run("--json", server.url, GONE)
    assert result.exit_code == 1
    there, gone = (msgspec.json.decode(line, type=Seen) for line in result.output.splitlines())
    assert there.snapshot == RECORD
    assert (gone.endpoint, gone.is_, gone.snapshot) == (GONE, "down", None)
    assert json.loads(result.output.splitlines()[1])["is"] == "down"
    assert server.asked == [{"steps": 0}]


@pytest.mark.parametrize("url", ["nonsense", "", "http://a/v1", "http://[::1"])
def test_what_is_no_address_of_a_server_is_bad_input(url):
    assert run(url).exit_code == 2


# ------------------------------------------------------------- recorded and replayed


def recorded(path: Path, rounds: int, *urls: str) -> list[Seen]:
    with path.with_suffix(".out").open("w") as out:
        console = Console(file=out)
        watch(urls, api_key=None, as_json=False, record=path, console=console, rounds=rounds)
    return list(read_recording(path))


@pytest.fixture
def _at_once(monkeypatch):
    monkeypatch.setattr("conserve_sgl.status.command.EVERY_S", 0.0)


@pytest.mark.usefixtures("_at_once")
def test_a_recording_has_every_step_once(server, tmp_path):
    looks = iter([keeps(*range(3)), keeps(*range(5)), keeps(*range(5)), keeps(*range(9))])
    server.status = lambda query: next(looks)(query)
    seen = recorded(tmp_path / "r", 4, server.url)
    assert [step.seq for look in seen for step in look.snapshot.steps] == list(range(9))
    assert server.asked == [{"since": 0}, {"since": 3}, {"since": 5}, {"since": 5}]
    assert sum(look.lost_steps for look in seen) == 0


@pytest.mark.usefixtures("_at_once")
def test_a_server_that_started_anew_is_asked_again_for_all_of_its_steps(server, tmp_path):
    anew = keeps(0, 1, server=changed(SERVER, pid=43))
    looks = iter([keeps(*range(100)), anew, anew])
    server.status = lambda query: next(looks)(query)
    first, second = recorded(tmp_path / "r", 2, server.url)
    assert len(first.snapshot.steps) == 100
    assert [step.seq for step in second.snapshot.steps] == [0, 1]
    assert second.lost_steps == 0


@pytest.mark.usefixtures("_at_once")
def test_a_server_that_is_down_for_a_while_goes_on_where_it_was(server, tmp_path):
    looks = iter([keeps(0, 1), lambda _query: (503, {}), keeps(1, 2, 3)])
    server.status = lambda query: next(looks)(query)
    seen = recorded(tmp_path / "r", 3, server.url)
    assert [look.is_ for look in seen] == [None, "down", None]
    assert [step.seq for look in seen if look.snapshot for step in look.snapshot.steps] == [
        *range(4)
    ]


@pytest.mark.usefixtures("_at_once")
def test_a_recording_is_shown_with_what_changed_and_the_sums(server, tmp_path):
    paused = changed(RECORD.why, bound="paused", text="Offline work is paused.")
    looks = iter([keeps(*range(10)), keeps(*range(20)), keeps(*range(25, 30), why=paused)])
    server.status = lambda query: next(looks)(query)
    recorded(tmp_path / "r", 3, server.url)
    result = run("--replay", str(tmp_path / "r"))
    assert result.exit_code == 0
    assert f"{server.url}: 3 looks from " in result.output
    assert result.output.count("The rows leave no more time.") == 1
    assert result.output.index("Offline work is paused.") > result.output.index("The rows leave")
    assert "25 steps, 5 lost between looks: offline rows 100%" in result.output


@pytest.mark.usefixtures("_at_once")
def test_a_trace_is_written_of_a_recording_and_of_a_server(server, tmp_path):
    server.status = keeps(*range(10))
    recorded(tmp_path / "r", 2, server.url)
    for number, options in enumerate((["--replay", str(tmp_path / "r")], [server.url])):
        out = tmp_path / f"{number}.json"
        assert run(*options, "--trace", str(out)).exit_code == 0
        trace = json.loads(out.read_text())
        assert sum(event["ph"] == "X" for event in trace["traceEvents"]) == 10


def test_a_trace_without_steps_is_not_written(server, tmp_path):
    result = run(server.url, "--trace", str(tmp_path / "t.json"))
    assert isinstance(result.exception, InputError)
    assert "status.enabled" in str(result.exception)
    assert not (tmp_path / "t.json").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--replay", "r", "http://a:1"],
        ["--replay", "r", "--watch"],
        ["--replay", "r", "--json"],
        ["--replay", "r", "--record", "s"],
        ["--watch", "--trace", "t.json"],
    ],
)
def test_options_that_do_not_go_together_are_bad_input(options):
    assert run(*options).exit_code == 2


def test_a_file_that_is_no_recording_is_bad_input(tmp_path):
    assert isinstance(run("--replay", str(tmp_path / "none")).exception, InputError)


@pytest.mark.usefixtures("_at_once")
def test_a_terminal_shows_one_screen_that_changes(server, tmp_path):
    with (tmp_path / "tty").open("w") as out:
        console = Console(file=out, force_terminal=True, width=120)
        watch([server.url], api_key=None, as_json=False, record=None, console=console, rounds=2)
    assert "The rows leave no more time." in (tmp_path / "tty").read_text()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (5400, "1.5 h"), (2e5, "2.3 days")],
)
def test_a_duration_is_said_as_people_do(seconds, text):
    assert span(seconds) == text


# ------------------------------------------------------------------------ the pages


def _commands(page: str) -> list[str]:
    text = (CHECKOUT / page).read_text()
    return re.findall(r"^(?:timeout \d+ )?(conserve status[^#\n]*)", text, re.MULTILINE)


COMMANDS = [*_commands("README.md"), *_commands("docs/status.md"), *_commands("docs/operations.md")]


def test_the_pages_show_the_command():
    assert len(COMMANDS) >= 8


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.usefixtures("_at_once")
def test_the_commands_of_the_pages_run(server, command, tmp_path, monkeypatch):
    """In a folder with a recording; whatever would go on for ever ends after two looks."""
    monkeypatch.chdir(tmp_path)
    server.status = keeps(*range(10))
    recorded(tmp_path / "night.jsonl", 1, server.url)
    _, _, *options = shlex.split(re.sub(r"http://\S+", server.url, command))
    if not ({"--replay"} & set(options)) and server.url not in options:
        options.append(server.url)
    monkeypatch.setattr("conserve_sgl.status.command.count", lambda _from: [1, 2])
    result = run(*options)
    assert result.exit_code == 0, result.output


def test_what_is_recorded_is_a_snapshot():
    assert msgspec.json.decode(msgspec.json.encode(RECORD), type=Snapshot) == RECORD


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_recording_that_is_stopped_ends_well(server, tmp_path, number):
    path = tmp_path / "r.jsonl"
    server.status = keeps(*range(10))
    command = [sys.executable, "-m", "conserve_sgl.cli", "status", "--record", str(path)]
    with subprocess.Popen([*command, server.url], stdout=subprocess.PIPE) as process:
        while not (path.exists() and path.stat().st_size):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(20) == 0
    assert [step.seq for look in read_recording(path) for step in look.snapshot.steps] == [
        *range(10)
    ]
