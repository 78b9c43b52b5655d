"""`conserve tune` against a small HTTP server that says what it is told."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from conserve_sgl.cli import app
from conserve_sgl.errors import ServerError, SettingError
from conserve_sgl.settings import OfflineWork, offline_number

CHECKOUT = Path(__file__).resolve().parent.parent

STATE = {
    "offline_paused": False,
    "offline_starved_s": 0.0,
    "offline_bound": "slo.tpot",
    "batches_held": False,
    "offline_waiting": 12,
    "offline_running": 3,
    "slo": {"ttft": "1500ms", "tpot": "1.25x", "yield_ms": 5.0},
}


class Engine(ThreadingHTTPServer):
    """What a server of SGLang's answers on the two routes; `posted` is what came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, Any]] = {
            "/server_info": (200, {"internal_states": [{"conserve": STATE}]}),
            "/set_internal_state": (200, [True]),
        }
        self.posted: list[tuple[dict[str, float], str | None]] = []
        self.read_with: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Engine

    def do_GET(self) -> None:
        if self.path == "/server_info":
            self.server.read_with.append(self.headers["authorization"])
        status, body = self.server.answers[self.path]
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.posted.append((body["server_args"], self.headers["authorization"]))
        self.do_GET()

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine() as engine:
        Thread(target=engine.serve_forever, args=[0.01], daemon=True).start()
        yield engine
        engine.shutdown()


@pytest.fixture(autouse=True)
def _narrow(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def run(*options: str):
    return CliRunner().invoke(app, ["tune", *options])


def test_without_an_option_it_shows_and_changes_nothing(engine):
    result = run("--endpoint", engine.url)
    assert result.exit_code == 0
    holds = "offline runs, 12 waiting, 3 running; batches run; ttft 1500ms, tpot 1.25x, yield_ms 5"
    assert result.output == f"{engine.url}: {holds}\n"
    assert engine.posted == []


def test_without_an_option_it_says_what_bounds_offline_work(engine):
    state = STATE | {"status": {"why": {"text": "Nothing waits."}}}
    engine.answers["/server_info"] = (200, {"internal_states": [{"conserve": state}]})
    assert run("--endpoint", engine.url).output.splitlines()[1] == "  Nothing waits."
    assert "Nothing waits." not in run("--endpoint", engine.url, "--offline", "run").output


def test_servers_are_told_apart_by_their_whole_address(engine):
    urls = [f"{engine.url}/{'a-long-name-of-a-route/' * 4}{name}" for name in "ab"]
    for url in urls:
        path = url.removeprefix(engine.url)
        engine.answers[f"{path}/server_info"] = engine.answers["/server_info"]
    result = run(*(option for url in urls for option in ("--endpoint", url)))
    assert [line.split(": ")[0] for line in result.output.splitlines()] == urls


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "",
        "127.0.0.1:30000",
        "ftp://a",
        "http://",
        "http://a/v1",
        "http://a b",
        "http://[::1",
        "http://x:99999999",
    ],
)
def test_what_is_no_address_of_a_server_is_bad_input(engine, url):
    result = run("--endpoint", engine.url, "--endpoint", url, "--offline", "pause")
    assert result.exit_code == 2
    assert "--endpoint" in result.output
    assert engine.posted == []


@pytest.mark.parametrize(
    "option",
    [
        ("--api-key", "a\nb"),
        ("--admin-api-key", "a\0b"),
        ("--yield-ms", "nan"),
        ("--yield-ms", "inf"),
        ("--yield-ms", "-1"),
        ("--yield-ms", "1e300"),
    ],
)
def test_an_option_that_cannot_be_sent_is_bad_input(engine, option):
    result = run("--endpoint", engine.url, "--offline", "pause", *option)
    assert result.exit_code == 2
    assert option[0] in result.output
    assert engine.posted == []


def test_a_key_with_a_line_break_in_the_environment_is_bad_input(engine, monkeypatch):
    monkeypatch.setenv("CONSERVE_API_KEY", "a\nb")
    assert run("--endpoint", engine.url).exit_code == 2


def test_a_redirect_is_not_followed_and_says_where_to():
    class Moved(Handler):
        def do_GET(self) -> None:
            self.send_response(301)
            self.send_header("location", "https://engine:30000/")
            self.send_header("content-length", "0")
            self.end_headers()

    with Engine() as moved:
        moved.RequestHandlerClass = Moved
        Thread(target=moved.serve_forever, args=[0.01], daemon=True).start()
        result = run("--endpoint", moved.url, "--offline", "pause")
        moved.shutdown()
    assert len(moved.posted) == 1
    assert "301 Moved Permanently; it points to https://engine:30000/" in str(result.exception)


def test_what_is_asked_for_is_sent_to_every_server_with_the_key(engine):
    options = ["--offline", "pause", "--tpot", "200ms", "--yield-ms", "7", "--batches", "hold"]
    twice = ["--endpoint", engine.url, "--endpoint", engine.url + "/"]
    assert run(*options, *twice, "--api-key", "secret").exit_code == 0
    numbers = {"conserve_offline": 0, "conserve_tpot_ms": 200, "conserve_yield_ms": 7}
    numbers["conserve_batches"] = 0
    assert engine.posted == [(numbers, "Bearer secret")] * 2


def test_a_change_has_a_key_of_its_own_where_there_are_two(engine, monkeypatch):
    monkeypatch.setenv("CONSERVE_API_KEY", "for all")
    monkeypatch.setenv("CONSERVE_ADMIN_API_KEY", "for changes")
    assert run("--endpoint", engine.url, "--offline", "run").exit_code == 0
    assert engine.posted == [({"conserve_offline": 1}, "Bearer for changes")]
    assert engine.read_with == ["Bearer for all"]


def test_bad_input_sends_nothing(engine):
    result = run("--endpoint", engine.url, "--tpot", "fast")
    assert isinstance(result.exception, SettingError)
    assert "'fast' is not an objective" in str(result.exception)
    assert run("--endpoint", engine.url, "--offline", "stop").exit_code == 2
    assert engine.posted == []


def _commands(page: str) -> list[str]:
    return re.findall(r"^conserve tune[^#\n]*", (CHECKOUT / page).read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", [*_commands("README.md"), *_commands("docs/operations.md")])
def test_the_commands_of_the_pages_run(engine, command):
    _, _, *options = shlex.split(re.sub(r"http://\S+", engine.url, command))
    if "--endpoint" not in options:
        options += ["--endpoint", engine.url]
    assert run(*options).exit_code == 0
    assert len(engine.posted) == (options.count("--endpoint") if len(options) > 2 else 0)


def test_the_request_of_the_page_is_a_pause():
    page = (CHECKOUT / "docs" / "operations.md").read_text()
    (body,) = re.findall(r"-d '(\{.*\})'", page)
    assert json.loads(body) == {"server_args": offline_number(OfflineWork.PAUSED)}


@pytest.mark.parametrize(
    ("path", "answer", "reason"),
    [
        ("/set_internal_state", (200, [False]), "not changed; the server's log says why"),
        ("/set_internal_state", (401, {}), "401 Unauthorized; give --api-key or --admin-api-key"),
        ("/set_internal_state", (500, {}), "500 Internal Server Error"),
        ("/server_info", (200, {"internal_states": [{}]}), "no conserve in this server"),
        ("/server_info", (200, []), "no conserve in this server"),
    ],
)
def test_a_server_that_refuses_is_named(engine, path, answer, reason):
    engine.answers[path] = answer
    result = run("--endpoint", engine.url, "--offline", "run")
    assert isinstance(result.exception, ServerError)
    assert str(result.exception).startswith(engine.url)
    assert reason in str(result.exception)


def test_those_before_a_server_that_is_not_there_are_changed_and_shown(engine):
    gone = "http://127.0.0.1:9"
    result = run("--endpoint", engine.url, "--endpoint", gone, "--offline", "pause")
    assert isinstance(result.exception, ServerError)
    assert gone in str(result.exception)
    assert len(engine.posted) == 1
    assert engine.url in result.output
