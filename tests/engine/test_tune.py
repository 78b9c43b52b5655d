"""Settings that change while a server runs, what it says of itself, its end; `slack` slices."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import msgspec
import numpy
import pytest
from rich.console import Console
from typer.testing import CliRunner

from conserve_sgl.cli import app
from conserve_sgl.status.command import watch
from conserve_sgl.status.record import Snapshot
from conserve_sgl.status.recording import read_recording
from support.server import OFFLINE, until

pytestmark = pytest.mark.engine

CONFIG = """
slo: {ttft: 600000ms, tpot: 2x, yield_ms: 0.1}
offline: {retry_after_s: 3}
slices: {mode: slack}
status: {enabled: true}
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


def status(server, **query: int) -> Snapshot:
    answer = server.http.get("/conserve/status", params=query).raise_for_status()
    return msgspec.json.decode(answer.content, type=Snapshot)


def streamed(server, number: int) -> list[float]:
    """When a client asked for 8 tokens, and when it got each; those that come at once share what
    they took."""
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    body = {"text": f"{number}: {FOX}", "sampling_params": sampling, "stream": True}
    times = [time.monotonic()]
    with server.http.stream("POST", "/generate", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                tokens = json.loads(line[6:])["meta_info"]["completion_tokens"]
                new = tokens + 1 - len(times)
                times += numpy.linspace(times[-1], time.monotonic(), new + 1)[1:].tolist()
    assert len(times) == 9
    return times


def test_the_status_says_what_clients_measured_beside_offline_work(server):
    """The first test of a fresh server: in the window are these requests, and before them those
    with which SGLang warmed up, which were faster than steps of a tenth of a second are."""
    offline = {"sampling_params": {"max_new_tokens": 500, "ignore_eos": True}, "headers": OFFLINE}
    before = status(server)
    assert before.why.text == "Nothing waits: there is no offline work here."
    with ThreadPoolExecutor(4) as pool:
        with server.slow_steps(0.1):
            beside = [pool.submit(server.generate, f"{i} {FOX}", **offline) for i in range(2)]
            until(lambda: status(server).offline.rows == 2)
            asked = [pool.submit(streamed, server, number) for number in range(4)]
            times = [each.result() for each in asked]
            times += [streamed(server, number) for number in range(4, 10)]
            seen = status(server)
        assert [each.result()["meta_info"]["completion_tokens"] for each in beside] == [500] * 2
    for earlier, latency, measured in (
        (before.online.ttft, seen.online.ttft, [each[1] - each[0] for each in times]),
        (before.online.tpot, seen.online.tpot, [(each[-1] - each[1]) / 7 for each in times]),
        (before.online.itl, seen.online.itl, [gap for e in times for gap in numpy.diff(e[1:])]),
    ):
        assert latency.samples == earlier.samples + len(measured)
        rank = math.ceil(latency.samples / 2) - earlier.samples
        assert latency.p50_ms == pytest.approx(1e3 * sorted(measured)[rank - 1], rel=0.1)
    assert seen.online.ttft.objective_ms == 600_000
    assert seen.online.ttft.within == 1.0
    assert seen.kv.online + seen.kv.offline + seen.kv.cached + seen.kv.free == seen.kv.total
    assert seen.kv.offline > 0
    assert [job.running for job in seen.jobs] == [2]


def test_the_steps_of_the_status_are_those_that_ran(server):
    before = status(server).next_step
    rows, prompt = 3, f"{FOX * 20}"
    body = {"sampling_params": {"max_new_tokens": 30, "ignore_eos": True}}
    server.generate_all([f"{i} {prompt}" for i in range(rows)], **body, headers=OFFLINE)
    server.generate(f"online {prompt}", **body)
    # A first token comes with the prompt, and a step is told once it has ended.
    until(lambda: sum(step.online_rows for step in status(server, since=before).steps) >= 29)
    seen = status(server, since=before)
    steps = seen.steps
    assert [step.seq for step in steps] == list(range(before, seen.next_step))
    assert sum(step.offline_rows for step in steps) >= 29 * rows
    assert sum(step.online_prompt_tokens for step in steps) > 100
    assert sum(step.offline_prompt_tokens for step in steps) > 300
    assert sum(step.arrivals for step in steps) == 1
    for step, following in itertools.pairwise(steps):
        assert step.seconds is not None
        assert step.start_s + step.seconds + following.idle_s == pytest.approx(
            following.start_s, abs=1e-5
        )
    latest = status(server, steps=5)
    assert [step.seq for step in latest.steps] == list(
        range(latest.next_step - 5, latest.next_step)
    )
    assert server.http.get("/conserve/status", params={"since": "x"}).status_code == 400
    shown = server.state()["status"]
    assert msgspec.convert(shown, Snapshot).server == seen.server
    server.assert_idle_and_balanced()


def test_a_recording_of_a_server_that_runs_has_every_step_once(server, tmp_path):
    body = {"sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}
    path = tmp_path / "run.jsonl"
    with (tmp_path / "out").open("w") as out, ThreadPoolExecutor(1) as pool:
        offline = pool.submit(server.generate, FOX, **body, headers=OFFLINE)
        console = Console(file=out, width=200)
        watch(
            [server.base_url],
            api_key=None,
            as_json=False,
            record=path,
            console=console,
            rounds=3,
        )
        offline.result()
    looks = list(read_recording(path))
    seqs = [step.seq for look in looks for step in look.snapshot.steps]
    assert len(looks) == 3
    assert seqs == list(range(seqs[0], looks[-1].snapshot.next_step))
    assert not any(look.lost_steps for look in looks)
    result = CliRunner().invoke(app, ["status", server.base_url])
    assert result.exit_code == 0
    assert "Nothing waits: there is no offline work here." in result.output
    assert "Nothing waits" in tune(server)


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
