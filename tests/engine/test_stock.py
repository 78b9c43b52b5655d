"""SmolLM2 with the plugin loaded: the tokens are stock SGLang's, and offline work changes none.

Here layer slices yield to real arrivals, as they do in production, not at random.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.server import OFFLINE

pytestmark = pytest.mark.engine

SAMPLING = {"max_new_tokens": 24}


@pytest.fixture(scope="module")
def prompts(checkout: Path) -> list[str]:
    lines = (checkout / "configs/jobs/data/questions.jsonl").read_text().splitlines()
    return [f"Question: {json.loads(line)['question']}\nAnswer:" for line in lines[:12]]


@pytest.fixture(scope="module")
def stock_texts(start_server, smollm2, prompts) -> list[str]:
    with start_server(smollm2, "--chunked-prefill-size=256") as server:
        texts = server.generate_all(prompts, sampling_params=SAMPLING)
        france = server.generate("The capital of France is", sampling_params=SAMPLING)
        assert france["text"].startswith(" Paris")
        return texts


@pytest.fixture
def server(stock_texts, smollm2_server):  # noqa: ARG001  stock first, one engine at a time
    return smollm2_server


def test_without_offline_requests_the_tokens_are_stock(server, prompts, stock_texts):
    assert server.generate_all(prompts, sampling_params=SAMPLING) == stock_texts
    assert server.offline_accepted() == 0


def test_with_both_classes_every_token_is_stock(server, prompts, stock_texts):
    with ThreadPoolExecutor(1) as pool:
        offline = pool.submit(
            server.generate_all, prompts, sampling_params=SAMPLING, headers=OFFLINE
        )
        online = [server.generate(prompt, sampling_params=SAMPLING)["text"] for prompt in prompts]
        assert offline.result() == stock_texts
    assert online == stock_texts
    server.assert_idle_and_balanced()


def test_a_long_prefill_yields_to_arrivals(server):
    fox = "the quick brown fox jumps over the lazy dog. "
    long, short = [f"{i}: " + fox * 20 for i in range(2)], fox * 2
    alone = [server.generate(prompt, sampling_params=SAMPLING)["text"] for prompt in long]
    server.assert_idle_and_balanced()

    def offline() -> list[str]:
        return server.generate_all(long, sampling_params=SAMPLING, headers=OFFLINE)

    before = server.state()["slices"]
    assert server.beside_online(offline, short, sampling_params=SAMPLING) == alone
    server.assert_idle_and_balanced()
    after = server.state()["slices"]
    grown = {name: after[name] - before[name] for name in ("suspensions", "resumes")}
    assert grown["suspensions"] > 0
    assert grown["resumes"] == grown["suspensions"]
    assert after["slices"] > 5 * after["batches_sliced"]
    assert after["layers_computed"] == 30 * after["batches_sliced"]
    assert after["arrival_to_yield_ms"]["p50"] > 0
