"""Two real servers behind SGLang's own gateway: a batch over both, online requests beside it."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from rich.console import Console
from typer.testing import CliRunner

from conserve_sgl.batch.run_batch import RunBatch, run_batch
from conserve_sgl.bench.systems.server import free_port
from conserve_sgl.cli import app
from conserve_sgl.client.retry import Retry
from fleet.gateway import Gateway
from support.server import Server, Servers, until

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(400),
    pytest.mark.usefixtures("no_other_server"),
]

CONFIG = "offline: {take: spare, retry_after_s: 1}"
LINES = 40


@pytest.fixture(scope="module")
def gateway_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def workers(tmp_path_factory, tiny_llama, gateway_port) -> Iterator[list[Server]]:
    """Both at once: an engine that sleeps while it is idle leaves the processors to the other. The
    first has the Batch API, for both."""
    storage = tmp_path_factory.mktemp("batches")
    batches = f"{{storage_dir: {storage}, discover: 'http://127.0.0.1:{gateway_port}'}}"
    configs = [f"{CONFIG}\nbatch: {batches}", CONFIG]
    profiles = tmp_path_factory.mktemp("profiles")
    both = [Servers(lambda: tmp_path_factory.mktemp("server"), profiles) for _ in range(2)]
    try:
        started = []
        for servers, config in zip(both, configs, strict=True):
            with servers.start(tiny_llama, "--sleep-on-idle", config=config) as server:
                started.append(server)
        yield started
    finally:
        for servers in both:
            servers.close()


@pytest.fixture(scope="module")
def gateway(workers, gateway_port, tmp_path_factory) -> Iterator[Gateway]:
    log = tmp_path_factory.mktemp("gateway") / "log"
    urls = [worker.base_url for worker in workers]
    gateway = Gateway(urls, "--disable-circuit-breaker", log=log, port=gateway_port)
    yield gateway
    gateway.stop()


def lines() -> Iterator[str]:
    for i in range(LINES):
        body = {"model": "m", "prompt": f"line {i}", "max_tokens": 16, "temperature": 0}
        line = {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
        yield json.dumps(line) + "\n"


def batch(folder: Path, gateway: Gateway) -> RunBatch:
    (folder / "in.jsonl").write_text("".join(lines()))
    return RunBatch(
        input=str(folder / "in.jsonl"),
        output=str(folder / "out.jsonl"),
        errors=str(folder / "errors.jsonl"),
        endpoints=[],
        discover=gateway.url,
        max_in_flight=16,
        retry=Retry(first_delay_s=0.1, max_delay_s=0.5),
    )


def answers(folder: Path) -> dict[str, str]:
    """The text of every line, each there once."""
    return texts_of((folder / "out.jsonl").read_text())


def texts_of(output: str) -> dict[str, str]:
    records = [json.loads(line) for line in output.splitlines()]
    texts = {r["custom_id"]: r["response"]["body"]["choices"][0]["text"] for r in records}
    assert len(texts) == len(records) == LINES
    return texts


@contextmanager
def online_beside(gateway: Gateway) -> Iterator[Counter[int]]:
    """The statuses of online requests through the gateway, one after the other meanwhile."""
    statuses: Counter[int] = Counter()
    done = False

    def ask() -> None:
        body = {"model": "m", "prompt": "online", "max_tokens": 4, "temperature": 0}
        with httpx.Client(base_url=gateway.url, timeout=60) as http:
            while not done:
                statuses[http.post("/v1/completions", json=body).status_code] += 1

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        until(lambda: statuses.total() > 0 or asking.done())
        yield statuses
        done = True
        asking.result()


def test_a_batch_over_both_beside_online_requests(workers, gateway, tmp_path):
    before = [worker.offline_accepted() for worker in workers]
    with online_beside(gateway) as statuses:
        assert run_batch(batch(tmp_path, gateway), console=Console(file=io.StringIO())) == 0
    took = [w.offline_accepted() - n for w, n in zip(workers, before, strict=True)]
    assert sum(took) == LINES
    assert min(took) > 0
    assert set(statuses) == {200}
    texts = answers(tmp_path)
    alone = {"max_new_tokens": 16}
    assert workers[0].generate("line 7", sampling_params=alone)["text"] == texts["7"]
    for worker in workers:
        worker.assert_idle_and_balanced()


def test_a_servers_own_batch_goes_to_both(workers, gateway):
    before = [worker.offline_accepted() for worker in workers]
    url = f"{workers[0].base_url}/v1"
    with (
        openai.OpenAI(base_url=url, api_key="none", http_client=httpx.Client()) as client,
        online_beside(gateway) as statuses,
    ):
        file = client.files.create(file=("in.jsonl", "".join(lines()).encode()), purpose="batch")
        asked = client.batches.create(
            input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
        )
        until(lambda: client.batches.retrieve(asked.id).completed_at is not None)
        done = client.batches.retrieve(asked.id)
        texts = texts_of(client.files.content(done.output_file_id).text)
    took = [w.offline_accepted() - n for w, n in zip(workers, before, strict=True)]
    assert sum(took) == LINES
    assert min(took) > 0
    assert set(statuses) == {200}
    for worker in workers:
        alone = worker.generate("line 7", sampling_params={"max_new_tokens": 16})["text"]
        assert alone == texts["7"]
        worker.assert_idle_and_balanced()


def test_a_worker_whose_offline_work_is_paused_gets_none(workers, gateway, tmp_path):
    paused, other = workers
    tune = ["tune", "--endpoint", paused.base_url, "--offline"]
    assert CliRunner().invoke(app, [*tune, "pause"]).exit_code == 0
    until(lambda: _refuses(paused))
    before = [worker.offline_accepted() for worker in workers]
    with online_beside(gateway) as statuses:
        assert run_batch(batch(tmp_path, gateway), console=Console(file=io.StringIO())) == 0
    assert [paused.offline_accepted(), other.offline_accepted()] == [before[0], before[1] + LINES]
    assert set(statuses) == {200}
    answers(tmp_path)
    assert CliRunner().invoke(app, [*tune, "run"]).exit_code == 0


def _refuses(worker: Server) -> bool:
    body = {"text": "x", "sampling_params": {"max_new_tokens": 1}}
    worker.generate("online work keeps the scheduler awake")
    try:
        return worker.http.post("/offline/generate", json=body, timeout=2).status_code == 429
    except httpx.TimeoutException:  # it was in time to be taken, and waits
        return False


def test_a_worker_that_is_killed_leaves_its_lines_to_the_other(workers, gateway, tmp_path):
    first, second = workers
    with ThreadPoolExecutor(1) as pool:
        job = batch(tmp_path, gateway)
        future = pool.submit(run_batch, job, console=Console(file=io.StringIO()))
        before = first.offline_accepted()
        until(lambda: first.offline_accepted() > before or future.done())
        second.process.stop()
        assert future.result() == 0
    answers(tmp_path)
    first.assert_idle_and_balanced()
