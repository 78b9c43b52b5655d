"""Speculative decoding: offline rows among those that draft, preempted and sitting out at random.

What is drafted comes from what was read and said before, so texts that are asked for a second time
are drafted nearly right. Whatever is drafted, tokens are those of a server that drafts nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from support.server import HICACHE, OFFLINE, Server, until

pytestmark = pytest.mark.engine

CONFIG = """
slo: {ttft: 1x, tpot: 1x, yield_ms: 1}
memory: {online_reserve: 0.0}
checkpoint: {stride_tokens: 16}
"""
DRAFTS = 6
FLAGS = (
    "--speculative-algorithm=NGRAM",
    f"--speculative-num-draft-tokens={DRAFTS}",
    "--enable-deterministic-inference",  # sampling by seed
)
SERVERS = {
    "overlap": (*HICACHE, "--hicache-ratio=4"),
    "in turn": ("--disable-overlap-schedule",),
}
PREEMPTIONS = 20
TOKENS = 64
PROMPTS = [f"{i}: " + "the quick brown fox jumps over the dog. " * (1 + i % 4) for i in range(10)]
GREEDY = [{"max_new_tokens": TOKENS}] * len(PROMPTS)
SEEDED = [
    {"max_new_tokens": TOKENS, "temperature": 1.0, "top_p": 0.95, "sampling_seed": seed}
    for seed in range(len(PROMPTS))
]


def generate(
    server: Server, sampling: list[dict], at_once: int = 4, headers: Any = None
) -> list[dict]:
    def one(text: str, params: dict) -> dict:
        return server.generate(text, sampling_params=params, headers=headers)

    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, PROMPTS, sampling))


def tokens(answers: list[dict]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


@pytest.fixture(scope="module")
def stock(start_server, tiny_llama) -> dict[str, list]:
    """Without conserve and without drafts."""
    with start_server(tiny_llama, "--enable-deterministic-inference") as server:
        greedy, seeded = (tokens(generate(server, sampling)) for sampling in (GREEDY, SEEDED))
    assert all(len(answer) == TOKENS for answer in greedy)
    return {"greedy": greedy, "seeded": seeded}


@pytest.fixture(scope="module", params=SERVERS)
def server(request, start_server, tiny_llama, stock) -> Iterator[Server]:  # noqa: ARG001  before
    env = {
        "CONSERVE_TEST_PREEMPT": "7:0.03",
        "CONSERVE_TEST_OWNERSHIP": "1",
        "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16",
    }
    flags = ("--max-total-tokens=1536", *FLAGS, *SERVERS[request.param])
    with start_server(tiny_llama, *flags, config=CONFIG, env=env) as server:
        yield server


def test_without_offline_requests_the_tokens_are_stock(server, stock) -> None:
    assert tokens(generate(server, GREEDY)) == stock["greedy"]
    assert tokens(generate(server, SEEDED)) == stock["seeded"]
    server.assert_idle_and_balanced()


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_every_token_survives_preemption_and_sitting_out(server, stock, sampling) -> None:
    wanted = stock["greedy" if sampling is GREEDY else "seeded"]
    before = server.state()

    def since(name: str) -> int:
        return server.state()[name] - before[name]

    while since("offline_preempted") < PREEMPTIONS or not since("offline_rows_parked"):
        work = partial(generate, server, sampling, at_once=len(PROMPTS), headers=OFFLINE)
        assert tokens(server.beside_online(work, "an online question?")) == wanted
    state = server.state()
    assert state["checkpoint"]["restored_tokens"] > state["checkpoint"]["recomputed_tokens"]
    until(lambda: server.state()["checkpoint"]["pinned_tokens"] == 0)
    server.assert_idle_and_balanced()


def test_a_step_gives_several_tokens_and_the_scheduler_knows(server, stock) -> None:
    again = [generate(server, GREEDY) for _ in range(2)][-1]
    assert tokens(again) == stock["greedy"]
    for answer in again:
        assert answer["meta_info"]["completion_tokens"] == TOKENS
        assert answer["meta_info"]["spec_accept_length"] > 1.5
    assert 1.5 < server.state()["step_tokens"] <= DRAFTS


def test_prefills_are_whole(server) -> None:
    assert server.state()["slices"]["batches_sliced"] == 0
    log = server.process.log_path.read_text()
    assert log.count("with --speculative-algorithm a worker that drafts runs the steps") == 1
