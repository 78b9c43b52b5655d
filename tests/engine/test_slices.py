"""Offline prefills in layer slices, suspended at random layer boundaries, on real engines.

Online requests are never sliced, so their answers are the ones to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.server import OFFLINE, until

pytestmark = pytest.mark.engine

LAYERS = 6
CONFIG = """
slo: {ttft: 2000ms, tpot: 300ms, yield_ms: 5}
offline: {queue_requests: 64}
memory: {online_reserve: 0.0}
"""
ENV = {
    "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
}
FOX = "the quick brown fox jumps over the lazy dog. "
# A few to a batch, one that is chunked, and prefixes that others share.
PROMPTS = [FOX * 2 + f"{i}: " + FOX * length for i, length in enumerate((0, 1, 3, 9, 2, 28, 5, 12))]
SAMPLING = {"max_new_tokens": 12}


def start_forced(start_server, make_model, arch: str, *flags: str, probability: float = 0.6):
    env = {**ENV, "CONSERVE_TEST_FORCE_YIELD": f"7:{probability}"}
    return start_server(make_model(arch), *flags, config=CONFIG, env=env)


@pytest.fixture(scope="module")
def make_model(tmp_path_factory) -> Callable[[str], Path]:
    from support.tiny_models import make_tiny_model  # imports transformers, for the engine tier

    return lambda arch: make_tiny_model(tmp_path_factory.mktemp(arch), arch=arch, layers=LAYERS)


@pytest.fixture(scope="module", params=["overlap", "no-overlap"])
def server(request, start_server, make_model) -> Iterator:
    flags = ["--disable-overlap-schedule"] if request.param == "no-overlap" else []
    arch = {"overlap": "llama", "no-overlap": "qwen2"}[request.param]
    with start_forced(
        start_server, make_model, arch, "--chunked-prefill-size=1024", *flags, probability=0.8
    ) as server:
        yield server


def beside_online(server, work: Callable[[], Any]) -> Any:
    """The result of `work`, with online prefills and decode steps all along."""
    return server.beside_online(work, PROMPTS[1], sampling_params=SAMPLING)


def assert_each_layer_once(server) -> None:
    slices = server.state()["slices"]
    assert slices["suspended_requests"] == 0
    done = slices["batches_sliced"] * LAYERS
    assert slices["layers_computed"] == done + slices["layers_given_up"]


def generate_offline(server, **body: Any) -> list[str]:
    return server.generate_all(PROMPTS, sampling_params=SAMPLING, headers=OFFLINE, **body)


# First, before the fixture's server: two idle engines would keep both cores busy.
def test_ranks_never_diverge(start_server, make_model):
    # One core for each rank: SGLang would else want a NUMA node for each.
    env = {**ENV, "CONSERVE_TEST_FORCE_YIELD": "7:0.5", "SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    with start_server(make_model("qwen3"), "--tp-size=2", config=CONFIG, env=env) as server:
        alone = [server.generate(p, sampling_params=SAMPLING)["text"] for p in PROMPTS]
        server.assert_idle_and_balanced()
        assert beside_online(server, lambda: generate_offline(server)) == alone
        server.assert_idle_and_balanced()
        assert server.state()["slices"]["suspensions"] > 20
        assert_each_layer_once(server)
        assert _paused_in_between(server, lambda: generate_offline(server)) == alone
        server.assert_idle_and_balanced()


def _paused_in_between(server, work: Callable[[], Any]) -> Any:
    """The result of offline `work` that is paused in its midst, and goes on."""
    before = server.state()["offline_tokens"]["computed"]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        until(lambda: server.state()["offline_tokens"]["computed"] > before)
        assert server.set_internal_state({"conserve_offline": 0})
        until(lambda: server.state()["offline_running"] == 0)
        assert not future.done()
        assert server.set_internal_state({"conserve_offline": 1})
        return future.result()


def test_tokens_are_those_of_an_unsliced_run(server):
    alone = [server.generate(p, sampling_params=SAMPLING)["text"] for p in PROMPTS]
    server.assert_idle_and_balanced()
    before = server.state()["slices"]
    assert generate_offline(server) == alone
    server.assert_idle_and_balanced()
    assert beside_online(server, lambda: generate_offline(server)) == alone
    server.assert_idle_and_balanced()

    after = server.state()["slices"]
    assert after["batches_sliced"] > before["batches_sliced"]
    assert after["suspensions"] - before["suspensions"] > 50
    assert after["resumes"] == after["suspensions"] - after["batches_given_up"]
    assert_each_layer_once(server)


def logprobs(answer: dict, new_tokens: int) -> list[float]:
    meta = answer["meta_info"]
    # For no new tokens SGLang gives one more or not, depending on what else runs.
    rows = [*meta["input_token_logprobs"][1:], *meta["output_token_logprobs"][:new_tokens]]
    tops = [*meta["input_top_logprobs"][1:], *meta["output_top_logprobs"][:new_tokens]]
    return [row[0] for row in rows] + [entry[0] for top in tops for entry in top]


@pytest.mark.parametrize("new_tokens", [0, 4])
def test_logprobs_are_those_of_an_unsliced_run(server, new_tokens):
    body = {
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "sampling_params": {"max_new_tokens": new_tokens},
    }
    alone = [logprobs(server.generate(p, **body), new_tokens) for p in PROMPTS]
    server.assert_idle_and_balanced()

    def offline() -> list[dict]:
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            return list(pool.map(lambda p: server.generate(p, headers=OFFLINE, **body), PROMPTS))

    for mine, answer in zip(alone, beside_online(server, offline), strict=True):
        assert logprobs(answer, new_tokens) == pytest.approx(mine, abs=1e-4)
    server.assert_idle_and_balanced()


def test_a_grammar_holds_and_tokens_are_those_of_an_unsliced_run(server):
    sampling = {"max_new_tokens": 10, "regex": "[a-f]{3}-[0-9]{3}"}
    alone = server.generate(PROMPTS[3], sampling_params=sampling)["text"]
    assert alone[3] == "-"
    server.assert_idle_and_balanced()

    def offline() -> list[str]:
        return server.generate_all([PROMPTS[3]] * 3, sampling_params=sampling, headers=OFFLINE)

    assert beside_online(server, offline) == [alone] * 3
    server.assert_idle_and_balanced()


def test_clients_that_leave_a_suspended_prefill(server):
    accepted = server.offline_accepted()

    def leave_early(i: int) -> None:
        body = {"text": PROMPTS[i % len(PROMPTS)] + str(i), "sampling_params": SAMPLING}
        body["sampling_params"] = {"max_new_tokens": 2000, "ignore_eos": True}
        with pytest.raises(httpx.ReadTimeout):
            server.http.post("/generate", headers=OFFLINE, json=body, timeout=0.1 + 0.1 * i)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(leave_early, range(8)))
    assert server.offline_accepted() == accepted + 8
    server.assert_idle_and_balanced()
    assert_each_layer_once(server)


@pytest.mark.parametrize("rid", ["", "gone-1"])
def test_abort_of_all_or_some_of_a_suspended_prefill(server, rid):
    alone = [server.generate(p, sampling_params=SAMPLING)["text"] for p in PROMPTS]
    server.assert_idle_and_balanced()
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        accepted = server.offline_accepted()
        asked = [
            pool.submit(
                server.generate,
                prompt,
                rid=f"{'gone' if i % 2 else 'kept'}-{i}",
                sampling_params=SAMPLING,
                headers=OFFLINE,
            )
            for i, prompt in enumerate(PROMPTS)
        ]
        while server.offline_accepted() < accepted + len(PROMPTS):
            pass
        abort = {"rid": rid} if rid else {"abort_all": True}
        server.http.post("/abort_request", json=abort).raise_for_status()
        answers = [future.result() for future in asked]
    for i, answer in enumerate(answers):
        if answer["meta_info"]["finish_reason"]["type"] != "abort":
            assert answer["text"] == alone[i]
        else:
            assert not rid or i == 1
    server.assert_idle_and_balanced()
    assert_each_layer_once(server)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_pause_of_a_suspended_prefill_keeps_every_token(server, mode):
    alone = [server.generate(p, sampling_params=SAMPLING)["text"] for p in PROMPTS]
    server.assert_idle_and_balanced()
    with ThreadPoolExecutor(1) as pool:
        accepted = server.offline_accepted()
        offline = pool.submit(generate_offline, server)
        while server.offline_accepted() < accepted + len(PROMPTS):
            pass
        for _ in range(4):
            server.http.post("/pause_generation", json={"mode": mode}).raise_for_status()
            server.http.post("/continue_generation", json={}).raise_for_status()
        assert offline.result() == alone
    server.assert_idle_and_balanced()
    assert_each_layer_once(server)


def test_a_suspended_prefill_gives_its_kv_to_online_requests(server):
    # 2 x 1,900 tokens of a pool of 4,096: none is left for an offline prefill of 1,000.
    large = [f"{i} " + FOX * 42 for i in range(2)]
    alone = [server.generate(p, sampling_params=SAMPLING)["text"] for p in [*large, *PROMPTS]]
    server.assert_idle_and_balanced()
    given_up = server.state()["slices"]["batches_given_up"]

    def gave_up() -> bool:
        return server.state()["slices"]["batches_given_up"] > given_up

    while not gave_up():
        with ThreadPoolExecutor(1) as pool:
            offline = pool.submit(generate_offline, server)
            while not offline.done() and not gave_up():
                assert server.generate_all(large, sampling_params=SAMPLING) == alone[:2]
            assert offline.result() == alone[2:]
    server.assert_idle_and_balanced()
    assert_each_layer_once(server)
