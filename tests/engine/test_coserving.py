"""Online requests and offline work on one engine: tiny random model, real SGLang."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import httpx
import pytest

from support.server import OFFLINE, until

pytestmark = pytest.mark.engine

# No slack beside online rows and short steps without them, so that the few requests of a test meet
# every bound; without a reserve, so that the KV pool can run full.
CONFIG = """
slo: {ttft: 1x, tpot: 1x, yield_ms: 1}
offline: {queue_requests: 24, retry_after_s: 3}
memory: {online_reserve: 0.0}
"""
LONG_PROMPTS = [f"{i}: " + "the quick brown fox jumps over the lazy dog. " * 4 for i in range(10)]
SHORT_PROMPTS = [f"question {i}?" for i in range(8)]


# With overlap scheduling; test_checkpoint and test_slices have a server without.
@pytest.fixture(scope="module")
def server(start_server, tiny_llama) -> Iterator:
    env = {"SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16"}
    with start_server(tiny_llama, config=CONFIG, env=env) as server:
        yield server


THINKING_S = 0.1  # between two online requests; the offline work of these tests lives on it


def _online_stream(server, until) -> list[str]:
    """Short online requests one after the other until `until()`; their answers."""
    answers = []
    while not until():
        time.sleep(THINKING_S)
        prompt = SHORT_PROMPTS[len(answers) % len(SHORT_PROMPTS)]
        answers.append(server.generate(prompt)["text"])
    return answers


def test_offline_tokens_are_those_of_a_run_alone(server):
    sampling = {"max_new_tokens": 192}
    alone = [server.generate(p, sampling_params=sampling)["text"] for p in LONG_PROMPTS]
    online_alone = [server.generate(p)["text"] for p in SHORT_PROMPTS]
    server.assert_idle_and_balanced()

    with ThreadPoolExecutor(1) as pool:
        offline = pool.submit(
            server.generate_all, LONG_PROMPTS, sampling_params=sampling, headers=OFFLINE
        )
        online = _online_stream(server, offline.done)
        assert offline.result() == alone

    assert len(online) > 4
    assert online == [online_alone[i % len(SHORT_PROMPTS)] for i in range(len(online))]
    server.assert_idle_and_balanced()


def test_rows_sit_out_while_online_rows_decode(server):
    before = server.state()
    with ThreadPoolExecutor(1) as pool:
        offline = pool.submit(
            server.generate_all,
            LONG_PROMPTS,
            sampling_params={"max_new_tokens": 64},
            headers=OFFLINE,
        )
        _online_stream(server, offline.done)
    after = server.state()
    assert after["offline_rows_parked"] > before["offline_rows_parked"]
    assert after["offline_parked"] == 0
    server.assert_idle_and_balanced()


def test_the_backlog_stays_out_of_the_gauges_of_online_load(server):
    with ThreadPoolExecutor(1) as pool:
        offline = pool.submit(
            server.generate_all,
            LONG_PROMPTS * 2,
            sampling_params={"max_new_tokens": 64},
            headers=OFFLINE,
        )
        seen_backlog = False
        while not offline.done():
            seen_backlog |= server.state()["offline_waiting"] > 0
            loads = server.http.get("/v1/loads").json()
            assert all(load["num_waiting_reqs"] == 0 for load in loads["loads"])
        offline.result()
    assert seen_backlog


def test_one_offline_request_too_many_is_told_to_come_back(server):
    with ThreadPoolExecutor(40) as pool:
        posts = [
            pool.submit(
                server.http.post,
                "/generate",
                headers=OFFLINE,
                json={"text": f"n{i}", "sampling_params": {"max_new_tokens": 200}},
            )
            for i in range(40)
        ]
        answers = [post.result() for post in posts]
    statuses = [answer.status_code for answer in answers]
    assert statuses.count(200) >= 24
    assert statuses.count(429) == 40 - statuses.count(200) > 0
    refused = [answer for answer in answers if answer.status_code == 429]
    assert all(3 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
    server.assert_idle_and_balanced()


def test_more_prompts_in_one_request_than_the_queue_holds(server):
    body = {"text": [f"p{i}" for i in range(60)], "sampling_params": {"max_new_tokens": 4}}
    answer = server.http.post("/generate", headers=OFFLINE, json=body)
    assert answer.status_code == 429
    assert 3 <= int(answer.headers["retry-after"]) <= 60
    server.assert_idle_and_balanced()


def test_clients_that_leave_free_what_they_held(server):
    """Disconnects of offline requests that wait, prefill, decode and sit out."""
    accepted = server.offline_accepted()

    def leave_early(i: int) -> None:
        body = {
            "text": LONG_PROMPTS[i % len(LONG_PROMPTS)] + str(i),
            "sampling_params": {"max_new_tokens": 2000, "ignore_eos": True},
        }
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/generate", headers=OFFLINE, json=body, timeout=1 + 0.2 * i)

    with ThreadPoolExecutor(13) as pool:
        leaving = [pool.submit(leave_early, i) for i in range(12)]
        _online_stream(server, lambda: all(f.done() for f in leaving))
        for future in leaving:
            future.result()
    assert server.offline_accepted() == accepted + 12
    server.assert_idle_and_balanced()


def test_abort_all(server):
    body = {"text": LONG_PROMPTS[0], "sampling_params": {"max_new_tokens": 2000}}
    accepted = server.offline_accepted()
    with ThreadPoolExecutor(12) as pool:
        posts = [
            pool.submit(server.http.post, "/generate", headers=OFFLINE, json=body)
            for _ in range(12)
        ]
        until(lambda: server.offline_accepted() >= accepted + 12)
        server.http.post("/abort_request", json={"abort_all": True}).raise_for_status()
        for post in posts:
            post.result()
    server.assert_idle_and_balanced()


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_pause_and_continue_keep_every_token(server, mode):
    sampling = {"max_new_tokens": 64}
    alone = [server.generate(p, sampling_params=sampling)["text"] for p in LONG_PROMPTS]
    accepted = server.offline_accepted()
    with ThreadPoolExecutor(1) as pool:
        offline = pool.submit(
            server.generate_all, LONG_PROMPTS, sampling_params=sampling, headers=OFFLINE
        )
        until(lambda: server.offline_accepted() >= accepted + len(LONG_PROMPTS))
        for _ in range(3):
            server.http.post("/pause_generation", json={"mode": mode}).raise_for_status()
            server.http.post("/continue_generation", json={}).raise_for_status()
        assert offline.result() == alone
    server.assert_idle_and_balanced()


def test_streamed_offline_text_has_no_gap_and_no_repeat(server):
    prompt, sampling = LONG_PROMPTS[3], {"temperature": 0, "max_new_tokens": 48}
    whole = server.generate(prompt, sampling_params=sampling)["text"]
    body = {"text": prompt, "sampling_params": sampling, "stream": True}
    with server.http.stream("POST", "/offline/generate", json=body) as response:
        events = [line for line in response.iter_lines() if line.startswith("data: {")]
    texts = [httpx.Response(200, text=event[6:]).json()["text"] for event in events]
    assert texts[-1] == whole
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


def test_kv_shortage_preempts_offline_rows_and_changes_no_token(server):
    # Six rows of up to 1,000 tokens in a pool of 4,096, admitted on an estimate of a few tokens.
    sampling, prompts = {"max_new_tokens": 800}, LONG_PROMPTS[:6]
    alone = [
        text
        for three in (prompts[:3], prompts[3:])
        for text in server.generate_all(three, sampling_params=sampling)
    ]
    before = server.state()["offline_preempted"]
    with ThreadPoolExecutor(1) as pool:
        offline = pool.submit(
            server.generate_all, prompts, sampling_params=sampling, headers=OFFLINE
        )
        while not offline.done():
            server.generate(SHORT_PROMPTS[0])
            time.sleep(1)  # while online is away, all six rows decode and grow
        assert offline.result() == alone
    assert server.state()["offline_preempted"] > before
    server.assert_idle_and_balanced()


def test_arrivals_reach_the_scheduler_before_their_requests(server):
    before = server.state()["arrivals_received"]
    server.generate_all(SHORT_PROMPTS)
    state = server.state()
    assert state["arrivals_received"] == before + len(SHORT_PROMPTS)
    assert 0 < state["arrival_ms"]["p50"] <= state["arrival_ms"]["p99"]


def test_offline_work_pushes_no_online_prefix_out_of_the_cache(server):
    """Three pools' worth of offline tokens later, an online prompt is still a hit."""
    prompt = "an online conversation that will go on later, " * 6
    server.generate(prompt)
    cached = server.generate(prompt)["meta_info"]["cached_tokens"]
    assert cached > 40
    texts = [f"{i} of a batch: " + "many other words of a long prompt. " * 20 for i in range(60)]
    sampling = {"max_new_tokens": 8}
    for batch in (texts[:20], texts[20:40], texts[40:]):  # the queue holds 24
        answers = server.generate_all(batch, sampling_params=sampling, headers=OFFLINE)
        assert all(answers)
    assert server.generate(prompt)["meta_info"]["cached_tokens"] == cached


def test_an_online_prompt_gets_kv_from_offline_rows_in_the_same_step(server):
    """The pool is full of offline rows that would run for long; online does not wait for them."""
    with ThreadPoolExecutor(1) as pool:
        offline = pool.submit(
            server.generate_all,
            LONG_PROMPTS[:8],
            sampling_params={"max_new_tokens": 400, "ignore_eos": True},
            headers=OFFLINE,
        )
        before = server.state()["offline_preempted"]
        answers = 0
        while not offline.done():
            server.generate(f"{answers} " + "words of a prompt that needs room, " * 40)
            answers += 1
            time.sleep(THINKING_S)
        offline.result()
    assert answers > 3
    assert server.state()["offline_preempted"] > before
    server.assert_idle_and_balanced()
