"""Adapters (LoRA) through preemptions, sitting out and suspended prefills: SGLang, tiny model.

A batch holds two adapters, the base model counts as one, and requests come with three. So some give
way all the time, without any fault that a test would put in.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import msgspec
import pytest

from support.server import OFFLINE, Server, until

pytestmark = pytest.mark.engine

CONFIG = """
slo: {ttft: 1x, tpot: 1x, yield_ms: 1}
memory: {online_reserve: 0.0}
checkpoint: {stride_tokens: 16}
"""
ADAPTERS = (None, "one", "two")
PREEMPTIONS, SUSPENSIONS = 20, 10
TOKENS = 48


class Asked(msgspec.Struct, frozen=True):
    text: str
    adapter: str | None


ASKED = [
    Asked(f"{i % 5}: " + "the quick brown fox jumps over the dog. " * (1 + i % 5), ADAPTERS[i % 3])
    for i in range(15)
]


@pytest.fixture(scope="module")
def server(start_server, tiny_llama, tmp_path_factory) -> Iterator[Server]:
    from support.tiny_models import make_tiny_adapter  # imports transformers, for the engine tier

    folder = tmp_path_factory.mktemp("adapters")
    paths = [
        f"{name}={make_tiny_adapter(folder / name, model=tiny_llama, seed=seed)}"
        for seed, name in enumerate(ADAPTERS)
        if name is not None
    ]
    env = {
        "CONSERVE_TEST_FORCE_YIELD": "7:0.5",
        "CONSERVE_TEST_OWNERSHIP": "1",
        "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16",
    }
    flags = ("--max-total-tokens=1280", "--max-loras-per-batch=2", "--lora-paths", *paths)
    with start_server(tiny_llama, *flags, config=CONFIG, env=env) as server:
        yield server


def reply(server: Server, asked: Asked, headers: dict[str, str] | None = None) -> str:
    sampling = {"max_new_tokens": TOKENS}
    answer = server.generate(
        asked.text, sampling_params=sampling, lora_path=asked.adapter, headers=headers
    )
    return answer["text"]


def replies(server: Server, at_once: int, headers: dict[str, str] | None = None) -> list[str]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda asked: reply(server, asked, headers), ASKED))


def test_tokens_are_those_of_a_run_alone(server) -> None:
    """Offline and online, each with its adapter or none, all at once and again and again."""
    alone = replies(server, at_once=1)
    assert len(set(alone)) == len(ASKED)  # each prompt comes with all three

    def met_enough(state: dict) -> bool:
        return (
            state["offline_preempted"] >= PREEMPTIONS
            and state["offline_rows_parked"] > 0
            and state["slices"]["suspensions"] >= SUSPENSIONS
        )

    while not met_enough(state := server.state()):
        offline = partial(replies, server, at_once=len(ASKED), headers=OFFLINE)
        with ThreadPoolExecutor(1) as pool:
            online = pool.submit(replies, server, at_once=3)
            assert server.beside_online(offline, "an online question?", lora_path="two") == alone
            assert online.result() == alone
    assert state["checkpoint"]["restored_tokens"] > 0
    until(lambda: server.state()["checkpoint"]["pinned_tokens"] == 0)
    server.assert_idle_and_balanced()


def test_an_online_request_does_not_wait_for_a_place_among_offline_adapters(server) -> None:
    """Both places are held by offline requests that run for long; it takes one of them."""
    long = {"max_new_tokens": 400}
    run_on = partial(server.generate, "run on", sampling_params=long, headers=OFFLINE)
    question = Asked("an online question?", "two")
    alone = reply(server, question)
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(run_on, lora_path=adapter) for adapter in (None, "one")]
        until(lambda: server.state()["offline_running"] == len(running))
        assert reply(server, question) == alone
        assert not any(future.done() for future in running)
        texts = [future.result()["text"] for future in running]
    assert texts == [run_on(lora_path=adapter)["text"] for adapter in (None, "one")]
    server.assert_idle_and_balanced()
