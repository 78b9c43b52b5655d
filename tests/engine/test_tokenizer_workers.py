"""`--tokenizer-worker-num`: several HTTP processes, one scheduler; SGLang, tiny model."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import msgspec
import numpy as np
import pytest

from conserve_sgl.settings import OfflineWork, offline_number
from support.server import OFFLINE, Server, until

pytestmark = pytest.mark.engine

QUEUE = 24
CONFIG = f"""
slo: {{ttft: 1x, tpot: 1x}}
memory: {{online_reserve: 0.0}}
offline: {{queue_requests: {QUEUE}}}
"""
WORKERS = 2
TOKENS = 24
AT_ONCE = QUEUE - 1  # two requests that come to two workers in the same microsecond may be one more
PROMPTS = [f"{i}: " + "the quick brown fox jumps over the dog. " * (1 + i % 4) for i in range(16)]


class Served(msgspec.Struct):
    server: Server
    counts: Path
    """The file over which the workers count."""

    def offline_of_each_worker(self) -> list[int]:
        """Offline requests that each worker ever had."""
        lines = np.fromfile(self.counts, np.int64).reshape(-1, 2)
        return [int(ever) for _, ever in lines[1:] if ever]


@pytest.fixture(scope="module")
def served(start_server, tiny_llama) -> Iterator[Served]:
    flags = (f"--tokenizer-worker-num={WORKERS}", "--enable-metrics")
    with start_server(tiny_llama, *flags, config=CONFIG) as server:
        yield Served(server, _shared_by_processes_of(server))


def _shared_by_processes_of(server: Server) -> Path:
    assert server.process.pid is not None
    session = os.getsid(server.process.pid)
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # others come and go
            if os.getsid(int(maps.parent.name)) == session:
                found = re.search(r"/\S*conserve-in-hand-\w+", maps.read_text())
                if found:
                    return Path(found[0])
    raise AssertionError("no process counts")


def ask(server: Server, text: str, headers: dict[str, str] | None = None) -> httpx.Response:
    """On a connection of its own: whichever worker is the quicker takes it."""
    body = {"text": text, "sampling_params": {"temperature": 0, "max_new_tokens": TOKENS}}
    with httpx.Client(base_url=server.base_url, timeout=120) as http:
        return http.post("/generate", json=body, headers=headers)


def reply(server: Server, text: str, headers: dict[str, str] | None = None) -> str:
    return ask(server, text, headers).raise_for_status().json()["text"]


def replies(server: Server, headers: dict[str, str] | None = None) -> list[str]:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda text: reply(server, text, headers), PROMPTS))


def test_every_worker_reads_the_class_and_tokens_are_those_of_a_run_alone(served):
    server = served.server
    alone = [reply(server, text) for text in PROMPTS]
    assert len(set(alone)) == len(PROMPTS)
    assert server.offline_accepted() == 0
    rounds = 0
    while rounds < 3 or len(served.offline_of_each_worker()) < WORKERS:
        rounds += 1
        with ThreadPoolExecutor(2) as pool:
            offline, online = pool.submit(replies, server, OFFLINE), pool.submit(replies, server)
            assert offline.result() == online.result() == alone
    state = server.state()
    assert state["offline_accepted"] == rounds * len(PROMPTS)
    assert sum(served.offline_of_each_worker()) == rounds * len(PROMPTS)
    assert state["arrivals_received"] >= (1 + rounds) * len(PROMPTS)
    server.assert_idle_and_balanced()


def test_what_is_in_hand_is_counted_over_all_workers(served):
    server = served.server
    server.set_internal_state(offline_number(OfflineWork.PAUSED))
    with ThreadPoolExecutor(2 * QUEUE) as pool:
        futures = [pool.submit(ask, server, PROMPTS[0], OFFLINE) for _ in range(2 * QUEUE)]
        until(lambda: sum(future.done() for future in futures) >= AT_ONCE)
        server.set_internal_state(offline_number(OfflineWork.RUNS))
        answers = [future.result() for future in futures]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert AT_ONCE <= len(refused) <= QUEUE
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert {a.status_code for a in answers if a not in refused} == {200}
    server.assert_idle_and_balanced()


def test_at_sigterm_offline_requests_are_answered_at_once(served):
    """The last test of this server."""
    server = served.server
    server.set_internal_state(offline_number(OfflineWork.PAUSED))
    before = server.offline_accepted()
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        futures: list[Future[httpx.Response]] = [
            pool.submit(ask, server, text, OFFLINE) for text in PROMPTS
        ]
        until(lambda: server.offline_accepted() == before + len(PROMPTS))
        os.kill(server.process.pid, signal.SIGTERM)
        assert {future.result().status_code for future in futures} == {503}
    until(lambda: server.process.returncode is not None)
    assert not served.counts.exists()
