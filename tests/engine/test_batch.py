"""Files and Batches of a real server, through the official client."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from support.browser import Browser, browsing, needs_browser
from support.server import OFFLINE

# Less than the suite's limit: a server that stands still is found while its fixture can stop it.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

KEY = "secret"
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
OVER = ("failed", "completed", "expired", "cancelled")


class Restartable:
    """A server that can be killed; the next one has the same storage."""

    def __init__(self, start_server: Callable[..., Any], model: Path, storage: Path) -> None:
        self._start_server = start_server
        self._model = model
        self._storage = storage
        self.start()

    def start(self, start: str = "run") -> None:
        batch = f"{{storage_dir: {self._storage}, max_in_flight: 8, start: {start}}}"
        config = f"status: {{enabled: true}}\nbatch: {batch}"
        flags = (f"--api-key={KEY}", "--served-model-name=tiny-llama")
        starting = self._start_server(self._model, *flags, config=config)
        with starting as self.server:
            pass  # it stays until another one is asked for
        self.server.http.headers["Authorization"] = f"Bearer {KEY}"

    def log(self) -> str:
        return self.server.process.log_path.read_text()

    def kill(self) -> None:
        os.killpg(self.server.process.pid, signal.SIGKILL)
        self.server.process.wait(10)

    def terminate(self) -> None:
        os.kill(self.server.process.pid, signal.SIGTERM)
        self.server.process.wait(60)

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**self.options(**options))

    def options(self, **options: Any) -> dict[str, Any]:
        return {"base_url": f"{self.server.base_url}/v1", "api_key": KEY, "timeout": 60} | options


@pytest.fixture(scope="module")
def running(start_server, tiny_llama, tmp_path_factory) -> Restartable:
    return Restartable(start_server, tiny_llama, tmp_path_factory.mktemp("storage"))


def chat_body(text: str, tokens: int = 4) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "m", "messages": messages, "max_tokens": tokens, "temperature": 0}


def jsonl(url: str, bodies: list[dict[str, Any]]) -> bytes:
    lines = (
        {"custom_id": f"r{i}", "method": "POST", "url": url, "body": body}
        for i, body in enumerate(bodies)
    )
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def create(client: openai.OpenAI, content: bytes, endpoint: str = CHAT, window: str = "24h"):
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=window)


def until(client: openai.OpenAI, batch_id: str, condition: Callable[[Any], bool]):
    """The batch once `condition` holds for it; the test's own timeout ends a wait in vain."""
    while not condition(batch := client.batches.retrieve(batch_id)):
        assert batch.status not in OVER, batch
        time.sleep(0.05)
    return batch


def over(batch: Any) -> bool:
    return batch.status in OVER


def lines(client: openai.OpenAI, file_id: str) -> dict[str, Any]:
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    assert len({line["custom_id"] for line in found}) == len(found)
    return {line["custom_id"]: line for line in found}


def tpot_ms(client: openai.OpenAI, text: str) -> float:
    """What a client measures of a request: milliseconds for each token after the first."""
    times, tokens = [], 0
    options = {"stream": True, "stream_options": {"include_usage": True}}
    with client.chat.completions.create(**chat_body(text, tokens=30), **options) as stream:
        for chunk in stream:
            if chunk.choices:
                times.append(time.monotonic())
            elif chunk.usage:
                tokens = chunk.usage.completion_tokens
    return 1000 * (times[-1] - times[0]) / (tokens - 1)


def take_picture(browser: Browser, client: openai.OpenAI, folder: Path) -> None:
    """For README.md, of a batch beside some chats."""
    batch = create(client, jsonl(CHAT, [chat_body(f"paint {i}", 100) for i in range(4000)]))
    with ThreadPoolExecutor(3) as pool:
        talks = (pool.submit(tpot_ms, client, f"talk {number}") for number in range(10_000))
        until_s = time.monotonic() + 20
        while time.monotonic() < until_s:
            next(talks).result()
            browser.page.wait_for_timeout(200)
        next(talks)
        next(talks)
        browser.run("window.scrollTo(0, 0)")
        browser.run("document.getElementById('server').textContent = 'tiny-llama, on two cores'")
        browser.page.screenshot(path=folder / "conserve-page.png")
    client.batches.cancel(batch.id)
    while client.batches.retrieve(batch.id).status != "cancelled":
        time.sleep(0.05)


def sign_in(browser: Browser, url: str) -> None:
    """Open the page of a server that is idle; a wrong key is refused, the right one it takes."""
    browser.open(url)
    browser.wait(lambda: browser.page.is_visible("#key"))
    browser.write("#key", "wrong")
    browser.press("Enter")
    browser.shows("#key-refused", "does not take this key")
    browser.write("#key", KEY)
    browser.press("Enter")
    browser.shows("#sentence", "Nothing waits")
    times_ms = []
    for _ in range(3):  # the machine may be at something else; a slow page is slow each time
        browser.open(url)
        browser.shows("#sentence", "Nothing waits")
        times_ms.append(browser.shown_ms())
    assert min(times_ms) < 1000


@needs_browser
@pytest.mark.timeout(300)  # waits for what is shown once a second, beside slow steps
def test_the_page_shows_what_clients_measure_and_pauses_and_cancels_batches(
    running, tmp_path, checkout
):
    """The first test of this server: nobody else's latencies are in the window."""
    server, url = running.server, running.server.base_url
    bodies = [chat_body(f"look {i}", tokens=120) for i in range(40)]
    with running.client() as client, browsing(tmp_path / "profile") as browser:
        browser.looks(width=1000, height=795)
        sign_in(browser, f"{url}/conserve")
        with server.slow_steps(0.03):
            batch = create(client, jsonl(CHAT, bodies))
            browser.shows("#batches", f"{batch.id} in_progress")
            measured = [tpot_ms(client, f"chat {i}") for i in range(5)]
            asked = len(browser.asked)
            browser.wait(lambda: len(browser.asked) > asked + 1)  # it has seen the last of them
            _, p50_ms, *_ = browser.text("#latencies tbody tr:nth-child(2)").split()
            assert float(p50_ms) == pytest.approx(statistics.median(measured), rel=0.1)

            browser.click("#offline-switch")
            browser.confirm()
            browser.shows("#sentence", "Offline work is paused")
            browser.shows("#queue", " 0 run, 0 sit out")
            paused = server.state()["offline_tokens"]
            assert client.chat.completions.create(**chat_body("still here")).choices
            asked = len(browser.asked)
            browser.wait(lambda: len(browser.asked) > asked + 2)
            assert server.state()["offline_tokens"] == paused
            assert client.batches.retrieve(batch.id).status == "in_progress"
            browser.click("#offline-switch")
            browser.confirm()
            browser.shows("#offline-switch", "Pause offline work")

            endless = create(client, jsonl(CHAT, [chat_body(f"on {i}", 400) for i in range(400)]))
            browser.shows("#batches", endless.id)
            browser.click(f"[aria-label='Cancel {endless.id}']")
            browser.confirm()
            assert client.batches.retrieve(endless.id).status in ("cancelling", "cancelled")
            assert browser.hosts() == {url.removeprefix("http://")}
            assert browser.faults == []
        done = until(client, batch.id, over)
        assert done.request_counts.to_dict() == {"total": 40, "completed": 40, "failed": 0}
        output = lines(client, done.output_file_id)
        assert len(output) == 40
        for i in (0, 20, 39):
            direct = client.chat.completions.create(**bodies[i]).choices[0].message.content
            answer = output[f"r{i}"]["response"]["body"]
            assert answer["choices"][0]["message"]["content"] == direct
        while client.batches.retrieve(endless.id).status != "cancelled":
            time.sleep(0.05)
        if folder := os.environ.get("CONSERVE_SCREENSHOTS"):
            take_picture(browser, client, checkout / folder)
    server.assert_idle_and_balanced()


def test_a_batch_gives_the_tokens_of_direct_requests_as_offline_work(running):
    server, bodies = running.server, [chat_body(f"tell me {i}") for i in range(12)]
    bodies.append(chat_body("too long", tokens=10**9))
    accepted = server.offline_accepted()
    with running.client() as client:
        batch = until(client, create(client, jsonl(CHAT, bodies)).id, over)
        assert batch.status == "completed"
        assert batch.request_counts.to_dict() == {"total": 13, "completed": 12, "failed": 1}
        assert batch.usage.output_tokens == 48
        assert server.offline_accepted() >= accepted + 12
        output = lines(client, batch.output_file_id)
        for i, body in enumerate(bodies[:12]):
            direct = client.chat.completions.create(**body)
            answer = output[f"r{i}"]["response"]["body"]
            assert answer["choices"][0]["message"]["content"] == direct.choices[0].message.content
        (failed,) = lines(client, batch.error_file_id).values()
        assert failed["custom_id"] == "r12"
        assert failed["response"]["status_code"] == 400
    server.assert_idle_and_balanced()


def test_the_other_endpoints(running):
    completion = {"model": "m", "prompt": "hi", "max_tokens": 4}
    with running.client() as client:
        (model,) = client.models.list()  # SGLang's Responses take no other name
        response = {"model": model.id, "input": "hi", "max_output_tokens": 4}
        for endpoint, body in ((COMPLETIONS, completion), ("/v1/responses", response)):
            batch = until(client, create(client, jsonl(endpoint, [body]), endpoint).id, over)
            assert (batch.status, batch.request_counts.completed) == ("completed", 1)
            assert batch.usage.output_tokens > 0
        with pytest.raises(openai.BadRequestError, match="must be one of"):
            create(client, jsonl("/v1/embeddings", [{"input": "x"}]), "/v1/embeddings")


async def test_the_asynchronous_client_and_a_cancel(running):
    async with openai.AsyncOpenAI(**running.options()) as client:
        content = jsonl(CHAT, [chat_body(f"count {i}", tokens=400) for i in range(200)])
        file = await client.files.create(file=("in.jsonl", content), purpose="batch")
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=CHAT, completion_window="1h"
        )
        while (await client.batches.retrieve(batch.id)).status != "in_progress":
            await asyncio.sleep(0.05)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        while (batch := await client.batches.retrieve(batch.id)).status == "cancelling":
            await asyncio.sleep(0.05)
        assert batch.status == "cancelled"
        assert batch.request_counts.completed < 200
        assert batch.id in [b.id async for b in client.batches.list(limit=1)]
        assert (await client.files.delete(file.id)).deleted
    running.server.assert_idle_and_balanced()


def test_the_servers_key_is_asked_for(running):
    with (
        running.client(api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.files.list()
    for path in ("/v1/files", "/v1/batches", "/offline/v1/files"):
        answer = running.server.http.get(path, headers={"Authorization": ""})
        assert answer.status_code == 401


@pytest.fixture
def start_run_batch(running, tmp_path) -> Iterator[Callable[[bytes], subprocess.Popen[str]]]:
    """Starts `conserve run-batch` on a file of that content, into out.jsonl."""
    processes: list[subprocess.Popen[str]] = []

    def start(content: bytes) -> subprocess.Popen[str]:
        (tmp_path / "in.jsonl").write_bytes(content)
        command = [sys.executable, "-m", "conserve_sgl.cli", "run-batch", "-i", "in.jsonl"]
        command += ["-o", "out.jsonl", "--endpoint", running.server.base_url]
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=os.environ | {"CONSERVE_API_KEY": KEY},
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait(10)


def results(path: Path) -> dict[str, dict[str, Any]]:
    return {line["custom_id"]: line for line in map(json.loads, path.read_text().splitlines())}


def test_run_batch(running, tmp_path, start_run_batch):
    accepted = running.server.offline_accepted()
    bodies = [chat_body(f"say {i}") | {"n": None, "stream": None} for i in range(10)]
    process = start_run_batch(jsonl(CHAT, bodies))
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert len(results(tmp_path / "out.jsonl")) == 10
    assert running.server.offline_accepted() == accepted + 10


def test_a_line_that_the_route_refuses_is_the_only_one_that_fails(tmp_path, start_run_batch):
    """SGLang's /v1/responses knows its own model's name alone, its other routes any."""
    refused = jsonl(RESPONSES, [{"model": "m", "input": "hi"}]).replace(b'"r0"', b'"refused"')
    process = start_run_batch(jsonl(CHAT, [chat_body(f"say {i}") for i in range(6)]) + refused)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1, said
    assert sorted(results(tmp_path / "out.jsonl")) == [f"r{i}" for i in range(6)]
    error = results(tmp_path / "out.errors.jsonl")["refused"]["response"]
    assert error["status_code"] == 404
    assert "failed: 1 x 404 The model 'm' does not exist (refused)" in said


def test_a_response_that_was_aborted_is_sent_again(running, tmp_path, start_run_batch):
    accepted = running.server.offline_accepted()
    model = running.server.http.get("/v1/models").json()["data"][0]["id"]
    body = {"model": model, "input": "a story", "max_output_tokens": 300, "temperature": 0}
    process = start_run_batch(jsonl(RESPONSES, [body] * 4))
    while running.server.offline_accepted() < accepted + 4:
        assert process.poll() is None
        time.sleep(0.02)
    aborted = running.server.http.post("/abort_request", json={"rid": "", "abort_all": True})
    assert aborted.status_code == 200
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    found = results(tmp_path / "out.jsonl")
    assert {line["response"]["body"]["status"] for line in found.values()} == {"incomplete"}
    # Two fewer than were asked for: SGLang keeps them back on this route.
    assert {line["response"]["body"]["usage"]["output_tokens"] for line in found.values()} == {298}
    assert running.server.offline_accepted() > accepted + 4
    running.server.assert_idle_and_balanced()


def test_a_killed_server_goes_on_where_it_stopped(running):
    # No two end at the same time, so that whenever the server is killed it has some in hand.
    bodies = [chat_body(f"story {i}", tokens=24 + 4 * i) for i in range(60)]
    with running.client() as client:
        batch_id = create(client, jsonl(CHAT, bodies)).id
        until(client, batch_id, lambda batch: batch.request_counts.completed >= 5)
    running.kill()
    running.start()
    assert running.server.state()["profiles_measured"] == 0  # the first start left one
    (died_with,) = re.findall(r"died with (\d+) lines of batches in flight", running.log())
    assert 1 <= int(died_with) <= 8
    with running.client() as client:
        batch = until(client, batch_id, over)
        assert batch.status == "completed"
        assert batch.request_counts.to_dict() == {"total": 60, "completed": 60, "failed": 0}
        assert batch.usage.output_tokens == sum(body["max_tokens"] for body in bodies)
        assert sorted(lines(client, batch.output_file_id)) == sorted(f"r{i}" for i in range(60))
    assert running.server.offline_accepted() < 60
    running.server.assert_idle_and_balanced()


def test_a_server_that_was_told_to_stop_has_not_died_and_one_that_is_held_sends_nothing(running):
    bodies = [chat_body(f"tale {i}", tokens=60) for i in range(30)]
    with running.client() as client:
        batch_id = create(client, jsonl(CHAT, bodies)).id
        until(client, batch_id, lambda batch: batch.request_counts.completed >= 1)
    running.terminate()
    running.start("held")
    assert "lines of batches in flight" not in running.log()
    server = running.server
    assert server.state()["batches_held"]
    with running.client() as client:
        done = client.batches.retrieve(batch_id).request_counts.completed
        assert done < 30
        server.generate("offline work that is no batch's", headers=OFFLINE)
        assert server.offline_accepted() == 1
        assert server.set_internal_state({"conserve_batches": 1})
        assert not server.state()["batches_held"]
        batch = until(client, batch_id, over)
        assert batch.request_counts.to_dict() == {"total": 30, "completed": 30, "failed": 0}
        assert server.offline_accepted() == 1 + 30 - done
        assert server.set_internal_state({"conserve_batches": 0})
        held = create(client, jsonl(CHAT, bodies[:2])).id
        until(client, held, lambda batch: batch.status == "in_progress")
        assert client.batches.cancel(held).status == "cancelling"
        assert server.set_internal_state({"conserve_batches": 1})
    server.assert_idle_and_balanced()
