"""Without a prefix cache: whatever gives way is computed again, and nobody waits for ever."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from support.server import OFFLINE, until

pytestmark = pytest.mark.engine

CONFIG = """
slo: {ttft: 500ms, tpot: 30ms, yield_ms: 5}
memory: {online_reserve: 0.0}
slices: {enabled: false}
"""
ENV = {"CONSERVE_TEST_OWNERSHIP": "1", "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16"}
FLAGS = ("--disable-radix-cache", "--max-total-tokens=2048")
CHUNK_TOKENS = 128


@pytest.fixture(scope="module")
def server(start_server, tiny_llama) -> Iterator:
    with start_server(tiny_llama, *FLAGS, config=CONFIG, env=ENV) as server:
        yield server


def test_offline_tokens_are_those_of_a_run_alone(server):
    prompts = [f"{i}: " + "the quick brown fox jumps over the dog. " * 4 for i in range(10)]
    sampling = {"max_new_tokens": 200}
    alone = [
        text
        for some in (prompts[:5], prompts[5:])
        for text in server.generate_all(some, sampling_params=sampling)
    ]
    before = server.state()
    with ThreadPoolExecutor(1) as pool:
        offline = pool.submit(
            server.generate_all, prompts, sampling_params=sampling, headers=OFFLINE
        )
        while not offline.done():
            server.generate("words of a prompt that needs room, " * 20)
            time.sleep(0.2)
        assert offline.result() == alone
    after = server.state()
    assert not after["checkpoint"]["enabled"]
    assert after["offline_preempted"] > before["offline_preempted"]
    assert after["checkpoint"]["recomputed_tokens"] > before["checkpoint"]["recomputed_tokens"]
    server.assert_idle_and_balanced()


def test_a_prompt_that_an_offline_one_leaves_no_room_gets_it(server):
    """Between two chunks of the offline one. SGLang has an account of its own for `ignore_eos`."""
    prompt = "a document that fills the pool, " * 53
    before = server.state()["offline_tokens"]["computed"]
    with server.slow_steps(0.02), ThreadPoolExecutor(1) as pool:
        offline = pool.submit(server.generate, prompt, headers=OFFLINE)
        chunks = before + 10 * CHUNK_TOKENS
        until(lambda: server.state()["offline_tokens"]["computed"] >= chunks)
        sampling = {"max_new_tokens": 8, "ignore_eos": True}
        server.generate("words of a prompt that needs room, " * 35, sampling_params=sampling)
        assert not offline.done()
        offline.result()
    server.assert_idle_and_balanced()
