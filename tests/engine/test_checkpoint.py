"""Offline requests that give way again and again, and keep every token: SGLang, tiny model.

The KV pool holds a fraction of the work, and every offline request is preempted at random besides,
so that each test sees releases and resumes at all points of a request's life.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import pytest

from support.server import HICACHE, OFFLINE, until

pytestmark = pytest.mark.engine

CONFIG = """
slo: {{ttft: {ttft}, tpot: {tpot}, yield_ms: 20}}
memory: {{online_reserve: 0.0}}
checkpoint: {{stride_tokens: 16}}
slices: {{enabled: {slices}}}
"""
PREEMPTIONS = int(os.environ.get("CONSERVE_TEST_PREEMPTIONS", "40"))
"""At least so many in each test that counts them; for a soak set some thousands."""
PROMPTS = [f"{i}: " + "the quick brown fox jumps over the dog. " * (1 + i % 4) for i in range(16)]
SERVERS = {
    # Eight offline rows, about what the pool holds: more would give way when they have just begun.
    "tree": (
        CONFIG.format(ttft="2x", tpot="2x", slices=False),
        "--disable-overlap-schedule",
        "--max-running-requests=9",
    ),
    # Online prompts and rows take turns: each holds KV while the other runs.
    "host": (
        CONFIG.format(ttft="500ms", tpot="30ms", slices=True),
        "--enable-deterministic-inference",  # sampling by seed
        *HICACHE,
        "--hicache-ratio=4",
    ),
}


@pytest.fixture(scope="module", params=SERVERS)
def server(request, start_server, tiny_llama) -> Iterator:
    env = {
        "CONSERVE_TEST_PREEMPT": "7:0.03",
        "CONSERVE_TEST_OWNERSHIP": "1",
        "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16",
    }
    config, *flags = SERVERS[request.param]
    flags.append("--max-total-tokens=2048")
    with start_server(tiny_llama, *flags, config=config, env=env) as server:
        server.flags = flags
        server.lags = request.param == "host"  # overlap scheduling, see penalties
        yield server


def _in_turn(server, bodies: list[dict]) -> list[dict]:
    """Online, four at a time, so that nothing is preempted."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda body: server.generate(**body), bodies))


def _preempted(server, bodies: list[dict]) -> list[dict]:
    """Offline, all at a time."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: server.generate(**body, headers=OFFLINE), bodies))


def _texts(answers: list[dict]) -> list[str]:
    return [answer["text"] for answer in answers]


GREEDY = [{"max_new_tokens": 160}] * len(PROMPTS)
SEEDED = [
    {"max_new_tokens": 160, "temperature": 1.0, "sampling_seed": seed, "top_p": 0.95}
    for seed in range(len(PROMPTS))
]


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_every_token_survives_many_preemptions(server, sampling):
    if sampling is SEEDED and "--enable-deterministic-inference" not in server.flags:
        pytest.skip("SGLang samples by seed with --enable-deterministic-inference only")
    bodies = [
        {"text": prompt, "sampling_params": params}
        for prompt, params in zip(PROMPTS, sampling, strict=True)
    ]
    alone = _texts(_in_turn(server, bodies))
    assert len(set(alone)) == len(PROMPTS)
    before = server.state()
    until = before["offline_preempted"] + PREEMPTIONS
    while (after := server.state())["offline_preempted"] < until:
        assert _texts(_preempted(server, bodies)) == alone
    was, now = before["checkpoint"], after["checkpoint"]
    assert now["checkpoints"] > was["checkpoints"]
    assert now["checkpointed_bytes"] > was["checkpointed_bytes"]
    restored = now["restored_tokens"] - was["restored_tokens"]
    recomputed = now["recomputed_tokens"] - was["recomputed_tokens"]
    assert restored > 10 * recomputed
    assert now["pinned_tokens"] == 0
    server.assert_idle_and_balanced()


def test_requests_that_wait_are_loaded_before_their_turn(server):
    """Online bursts push all that is offline out of the device; it comes back beside rows."""
    if not server.state()["checkpoint"]["host_cache"]:
        pytest.skip("nothing is on the host without a host cache")
    before = server.state()["checkpoint"]["loaded_ahead_tokens"]
    _beside_bursts(server, [{"text": p, "sampling_params": GREEDY[0]} for p in PROMPTS])
    assert server.state()["checkpoint"]["loaded_ahead_tokens"] > before
    server.assert_idle_and_balanced()


def test_bursts_of_online_prompts_end_no_offline_request(server):
    """They take nearly the whole pool, time and again; whatever gave way comes back."""
    bodies = [{"text": p, "sampling_params": {"max_new_tokens": 200}} for p in PROMPTS[:10]]
    assert _beside_bursts(server, bodies) > 3
    server.assert_idle_and_balanced()


def test_a_flush_of_a_paused_engine_costs_recomputation(server):
    """As after an update of the weights: what waits has nothing left, on the device or the host."""
    bodies = [{"text": p, "sampling_params": {"max_new_tokens": 120}} for p in PROMPTS[:8]]
    alone = _texts(_in_turn(server, bodies))
    before = server.state()
    with ThreadPoolExecutor(1) as pool:
        offline = pool.submit(_preempted, server, bodies)
        all_of_them = before["offline_accepted"] + len(bodies)
        until(lambda: server.offline_accepted() >= all_of_them)
        server.http.post("/pause_generation", json={"mode": "retract"}).raise_for_status()
        server.http.post("/flush_cache").raise_for_status()
        assert server.state()["checkpoint"]["pinned_tokens"] == 0
        server.http.post("/continue_generation", json={}).raise_for_status()
        assert _texts(offline.result()) == alone
    recomputed = server.state()["checkpoint"]["recomputed_tokens"]
    assert recomputed > before["checkpoint"]["recomputed_tokens"]
    server.assert_idle_and_balanced()


@pytest.fixture
def slow_steps(server) -> Iterator[None]:
    with server.slow_steps(0.05):
        yield


@pytest.mark.usefixtures("slow_steps")
@pytest.mark.parametrize("number", range(3))
def test_a_prompt_gets_the_kv_of_an_offline_prompt_that_just_ended(server, number):
    """It comes in the last chunk of a prompt that leaves room for its first chunk and no more."""
    if "--disable-overlap-schedule" not in server.flags:
        pytest.skip("a prefill that is sliced stops for it, whatever the KV pool holds")
    prompt = f"{number} " + "a document that fills the pool, " * 53
    tokens = len(prompt)
    before = server.state()["offline_tokens"]["computed"]
    body = {"text": prompt, "sampling_params": {"max_new_tokens": 60, "ignore_eos": True}}
    events = []

    def offline() -> None:
        with server.http.stream("POST", "/offline/generate", json={**body, "stream": True}) as r:
            events.extend(line for line in r.iter_lines() if line.startswith("data: {"))

    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(offline)
        last_chunk = before + tokens // 128 * 128
        until(lambda: server.state()["offline_tokens"]["computed"] >= last_chunk)
        server.generate(f"{number}? " + "words of a prompt that needs room " * 18)
        assert len(events) < 5, "it waited for the offline request"
        ended.result()
    assert len(events) == 60
    server.assert_idle_and_balanced()


def _beside_bursts(server, bodies: list[dict]) -> int:
    """Run `bodies` offline, which must give what they give alone, beside bursts of online prompts
    that take nearly the whole pool; how many of those there were."""
    alone = _texts(_in_turn(server, bodies))
    bursts = 0
    with ThreadPoolExecutor(1) as pool:
        offline = pool.submit(_preempted, server, bodies)
        while not offline.done():
            burst = [f"{bursts} {i}, words of a prompt that needs room " * 15 for i in range(3)]
            server.generate_all(burst, sampling_params={"max_new_tokens": 24})
            bursts += 1
            time.sleep(0.2)  # offline rows come back and grow
        assert _texts(offline.result()) == alone
    return bursts


def test_a_stream_has_no_gap_and_no_repeat(server):
    def stream(prompt: str) -> list[str]:
        body = {
            "text": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": 120},
            "stream": True,
        }
        with server.http.stream("POST", "/offline/generate", json=body) as response:
            events = [line for line in response.iter_lines() if line.startswith("data: {")]
        return [httpx.Response(200, text=event[6:]).json()["text"] for event in events]

    bodies = [{"text": p, "sampling_params": {"max_new_tokens": 120}} for p in PROMPTS]
    alone = _texts(_in_turn(server, bodies))
    until = server.state()["offline_preempted"] + PREEMPTIONS
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        while server.state()["offline_preempted"] < until:
            for texts, whole in zip(pool.map(stream, PROMPTS), alone, strict=True):
                assert texts[-1] == whole
                assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    server.assert_idle_and_balanced()


@pytest.mark.parametrize("from_token", [-1, 0], ids=["output", "prompt and output"])
def test_logprobs_are_those_of_a_run_alone(server, from_token):
    bodies = [
        {
            "text": prompt,
            "sampling_params": {"max_new_tokens": 64},
            "return_logprob": True,
            "logprob_start_len": from_token,
            "top_logprobs_num": 2,
        }
        for prompt in PROMPTS[:8]
    ]

    def logprobs(answer: dict, key: str) -> list:
        return [(token, pytest.approx(p, abs=1e-3)) for p, token, _ in answer["meta_info"][key]]

    for alone, preempted in zip(_in_turn(server, bodies), _preempted(server, bodies), strict=True):
        assert preempted["text"] == alone["text"]
        for key in ("output_token_logprobs", "input_token_logprobs"):
            assert len(preempted["meta_info"][key]) == len(alone["meta_info"][key]), key
            assert logprobs(preempted, key) == [
                (token, p) for p, token, _ in alone["meta_info"][key]
            ]
    server.assert_idle_and_balanced()


def test_grammar_and_stop_strings_go_on_where_they_were(server):
    rules = [{"regex": "[a-z]{90,120}"}, {"stop": ["qz"]}, {"stop_regex": "[0-9]{3}"}]
    bodies = [
        {"text": prompt, "sampling_params": {"max_new_tokens": 120, **rule}}
        for prompt in PROMPTS[:4]
        for rule in rules
    ]
    alone = _in_turn(server, bodies)
    assert any(len(answer["text"]) < 100 for answer in alone)
    assert _texts(_preempted(server, bodies)) == _texts(alone)
    server.assert_idle_and_balanced()


PENALTIES = [
    {"frequency_penalty": 0.6},
    {"presence_penalty": 0.8},
    {"repetition_penalty": 1.4},
    {"min_new_tokens": 60, "stop_token_ids": list(range(60, 140))},
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda penalty: next(iter(penalty)))
def test_penalties_count_on(server, penalty):
    if server.lags:
        pytest.skip("with overlap scheduling SGLang's penalties lag behind or not, run by run")
    bodies = [
        {"text": prompt, "sampling_params": {"max_new_tokens": 80, **penalty}}
        for prompt in PROMPTS[:8]
    ]
    alone = _texts(_in_turn(server, bodies))
    before = server.state()["offline_preempted"]
    assert _texts(_preempted(server, bodies)) == alone
    assert server.state()["offline_preempted"] > before
    server.assert_idle_and_balanced()


def test_a_request_as_large_as_the_pool_ends(server):
    """SGLang cuts `max_new_tokens` to what the pool can hold; such a request runs alone."""
    big = {"text": PROMPTS[0], "sampling_params": {"max_new_tokens": 4000}}
    small = [{"text": p, "sampling_params": {"max_new_tokens": 40}} for p in PROMPTS[1:6]]
    answers = _preempted(server, [big, *small])
    assert answers[0]["meta_info"]["finish_reason"]["type"] == "length"
    assert answers[0]["meta_info"]["completion_tokens"] > 1900
    server.assert_idle_and_balanced()


def test_a_prompt_larger_than_the_pool_is_refused(server):
    answer = server.http.post(
        "/offline/generate",
        json={"text": "x" * 3000, "sampling_params": {"max_new_tokens": 4}},
    )
    assert answer.status_code == 400
    assert "3000" in answer.text
    server.assert_idle_and_balanced()
