"""Settings that change while the server runs, and its end; slices in `slack` mode."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from typer.testing import CliRunner

from conserve_sgl.cli import app
from support.server import OFFLINE, until

pytestmark = pytest.mark.engine

CONFIG = """
slo: {ttft: 600000ms, tpot: 2x, yield_ms: 0.1}
offline: {retry_after_s: 3}
slices: {mode: slack}
"""
FOX = "the quick brown fox jumps over the lazy dog. "
SHORT = {"sampling_params": {"max_new_tokens": 2}}


@pytest.fixture(scope="module")
def server(start_server, tiny_llama) -> Iterator:
    with start_server(tiny_llama, "--chunked-prefill-size=512", config=CONFIG) as server:
        yield server


def tune(server, *options: str) -> str:
    result = CliRunner().invoke(app, ["tune", "--endpoint", server.base_url, *options])
    assert result.exit_code == 0, result.output
    return result.output


def test_an_arrival_with_time_to_spare_is_yielded_to_once_the_objective_is_tight(server):
    """In slack mode, as `tune` moves the objective that it looks at."""
    numbers = iter(range(1000))

    def beside_a_prefill() -> None:
        """Online requests one after the other while an offline prompt is computed."""
        text = f"{next(numbers)}: {FOX * 45}"
        body = {"text": text, "sampling_params": {"max_new_tokens": 1}, "headers": OFFLINE}
        with ThreadPoolExecutor(1) as pool:
            offline = pool.submit(server.generate, **body)
            while not offline.done():
                server.generate(f"{next(numbers)} {FOX}", **SHORT)
            offline.result()

    beside_a_prefill()
    before = server.state()["slices"]
    assert before["batches_sliced"] > 0
    assert before["suspensions"] == 0

    tune(server, "--ttft", "1ms")
    assert server.state()["slo"] == {
        "ttft": "1ms",
        "tpot": "2x",
        "longest_gap": None,
        "yield_ms": 0.1,
    }
    while server.state()["slices"]["suspensions"] == 0:
        beside_a_prefill()
    server.assert_idle_and_balanced()


def test_what_the_configuration_would_not_take_changes_nothing(server):
    before = server.state()["slo"]
    for bad in (
        {"conserve_tpot_x": 0.5},
        {"conserve_offline": 0, "conserve_tea": 1},
        {"conserve_tpot_ms": 100, "pp_max_micro_batch_size": 0},  # SGLang's own, out of range
    ):
        assert not server.set_internal_state(bad)
    assert server.state()["slo"] == before
    assert not server.state()["offline_paused"]
    assert server.set_internal_state({"conserve_tpot_ms": 900, "pp_max_micro_batch_size": 8})
    assert server.state()["slo"]["tpot"] == "900ms"


def test_offline_work_pauses_and_goes_on_where_it_was(server):
    prompts = [f"{i}: {FOX * 5}" for i in range(6)]
    body = {"sampling_params": {"max_new_tokens": 400, "ignore_eos": True}}
    alone = server.generate_all(prompts, **body)
    with ThreadPoolExecutor(1) as pool:
        before = server.state()["offline_tokens"]["output"]
        offline = pool.submit(server.generate_all, prompts, **body, headers=OFFLINE)
        until(lambda: server.state()["offline_tokens"]["output"] > before + 60)
        assert "paused" in tune(server, "--offline", "pause")
        until(lambda: server.state()["offline_waiting"] == 6)
        state = server.state()
        assert state["offline_running"] == state["offline_parked"] == 0
        assert server.http.get("/health").status_code == 200
        server.generate(FOX * 30, **SHORT)
        assert server.state()["offline_tokens"] == state["offline_tokens"]
        assert not offline.done()
        assert "runs" in tune(server, "--offline", "run")
        assert offline.result() == alone
    server.assert_idle_and_balanced()


def test_a_server_that_is_told_to_end_waits_for_online_requests_alone(server):
    """Offline requests, those that run and those that wait, are to find another server."""
    long = {"max_new_tokens": 2000, "ignore_eos": True}
    online = {"temperature": 0, "max_new_tokens": 150, "ignore_eos": True}

    def ask_offline(number: int) -> httpx.Response:
        body = {"text": f"{number} {FOX}", "sampling_params": long}
        return httpx.post(f"{server.base_url}/generate", json=body, headers=OFFLINE, timeout=120)

    def probes() -> list[int]:
        return [server.http.get(path).status_code for path in ("/ready", "/health")]

    alone = server.generate(FOX, sampling_params=online)["text"]
    assert probes() == [200, 200]
    body = {"text": FOX, "sampling_params": online, "stream": True}
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(ask_offline, number) for number in range(20)]  # 16 rows
        until(lambda: server.state()["offline_running"] > 0)
        with server.http.stream("POST", "/generate", json=body) as response:
            events = (line[6:] for line in response.iter_lines() if line.startswith("data: {"))
            next(events)
            os.kill(server.process.pid, signal.SIGTERM)
            for answer in answers:
                refused = answer.result()
                assert refused.status_code == 503
                assert "shutting down" in refused.text
                assert refused.headers["retry-after"] == "3"
            assert probes() == [503, 503]  # nobody sends it more
            *_, last = events
        assert json.loads(last)["text"] == alone
    assert server.process.wait(60) is not None
