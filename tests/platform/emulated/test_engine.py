"""Real engines on an emulated device: overlap scheduling on, tokens that can be checked."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from conserve_sgl.device.table import Device, StepTimes, load_device
from conserve_sgl.emulation import Emulation
from conserve_sgl.platform.emulated.device import BUSY_METRIC
from conserve_sgl.policy.latency import StepKind, StepWork
from conserve_sgl.profile.store import read_profile
from support.server import HICACHE, OFFLINE, until

pytestmark = pytest.mark.engine

CONFIG = """
slo: {ttft: 500ms, tpot: 30ms, yield_ms: 5}
memory: {online_reserve: 0.0}
checkpoint: {stride_tokens: 16}
"""
PREEMPTED = 10
SUSPENDED = 3
PROMPTS = [
    f"{i}: " + "the quick brown fox jumps over the dog. " * (1 + 3 * i % 5) for i in range(12)
]
NOISE = 0.95
"""A step takes no less of its mean time."""


@pytest.fixture(scope="module")
def gpu() -> Device:
    """The shipped H100, with a model as deep as the tiny one, and a host that launches fast."""
    h100 = load_device("h100-llama8b-triton")
    return msgspec.structs.replace(
        h100, name="tiny-gpu", layers=4, launch_s=(0.001,) * 3, eager_layer_s=0.0001
    )


@pytest.fixture(scope="module")
def emulated(gpu: Device, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a server on that device."""
    path = tmp_path_factory.mktemp("device") / "gpu.json"
    path.write_bytes(msgspec.json.encode(gpu))
    return Emulation(str(path)).environment()


@pytest.fixture(scope="module")
def profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("profiles")


@pytest.fixture(scope="module")
def server(start_server, tiny_llama: Path, emulated: dict[str, str], profiles: Path) -> Iterator:
    """Conserve; its offline requests are preempted and suspended at random."""
    env = {
        **emulated,
        "CONSERVE_PROFILE_DIR": str(profiles),
        "CONSERVE_TEST_PREEMPT": "7:0.03",
        "CONSERVE_TEST_FORCE_YIELD": "7:0.3",
        "CONSERVE_TEST_OWNERSHIP": "1",
        "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16",
    }
    flags = ("--max-total-tokens=2048", *HICACHE, "--hicache-ratio=4")
    with start_server(tiny_llama, *flags, config=CONFIG, env=env) as server:
        yield server


def _body(text: str, tokens: int = 60) -> dict:
    return {"text": text, "sampling_params": {"max_new_tokens": tokens, "ignore_eos": True}}


def _tokens(server, at_once: int, headers: dict[str, str] | None = None) -> list[list[int]]:
    with ThreadPoolExecutor(at_once) as pool:
        ask = lambda text: server.generate(**_body(text), headers=headers)  # noqa: E731
        return [answer["output_ids"] for answer in pool.map(ask, PROMPTS)]


def _settled(state: dict) -> bool:
    """The accounts are closed a few steps after the answers have left."""
    finished = state["offline_finished"] == state["offline_accepted"]
    return finished and state["checkpoint"]["pinned_tokens"] == 0


def test_tokens_stay_through_preemption_and_suspension(server) -> None:
    calm = _tokens(server, at_once=2)  # online: nothing is preempted
    assert len({tuple(ids) for ids in calm}) == len(PROMPTS)

    state = server.state()
    while state["offline_preempted"] < PREEMPTED or state["slices"]["suspensions"] < SUSPENDED:
        assert _tokens(server, at_once=len(PROMPTS), headers=OFFLINE) == calm
        state = server.state()

    assert state["checkpoint"]["restored_tokens"] > 0
    until(lambda: _settled(server.state()))
    server.assert_idle_and_balanced()


def test_no_token_comes_before_the_device_is_done_with_it(server, gpu: Device) -> None:
    tokens = 80
    least_s = NOISE * StepTimes(gpu).mean_s(StepWork.of(decode_contexts=[20]))

    start_s = time.monotonic()
    server.generate(**_body("how long does this take", tokens))

    assert time.monotonic() - start_s > (tokens - 1) * least_s


def test_the_profile_at_start_is_the_device_s(server, gpu: Device, profiles: Path) -> None:
    (path,) = profiles.glob("*.json")
    profile = read_profile(path)

    assert profile.identity.device.startswith("tiny-gpu (emulated")
    assert profile.identity.overlap
    # A step is timed from one result to the next, so a host that was late moves time between steps.
    least_s = sum(map(StepTimes(gpu).mean_s, (step.work for step in profile.samples)))
    assert sum(step.seconds for step in profile.samples) > least_s / 2
    latency = server.state()["latency"]
    assert latency["errors"]["decode"]["steps"] > 0
    assert latency["coefficients_s"]["step"] + latency["coefficients_s"]["decode"] > 0.003
    assert {step.work.kind for step in profile.samples} == set(StepKind)


@pytest.fixture(scope="module")
def stock(start_server, tiny_llama: Path, emulated: dict[str, str]) -> Iterator:
    flags = ("--enable-mixed-chunk", "--enable-metrics")
    with start_server(tiny_llama, *flags, env=emulated) as server:
        yield server


def test_a_stock_server_gives_the_same_tokens_with_mixed_chunks_and_all_at_once(
    stock, server_tokens: list[list[int]]
) -> None:
    assert _tokens(stock, at_once=len(PROMPTS)) == server_tokens
    assert _tokens(stock, at_once=1) == server_tokens  # now from the radix cache


@pytest.fixture(scope="module")
def server_tokens(stock) -> list[list[int]]:
    return _tokens(stock, at_once=1)


@pytest.mark.parametrize(
    "extra",
    [
        {"return_logprob": True, "logprob_start_len": 0},
        {"return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 3},
        {"return_logprob": True, "token_ids_logprob": [5, 9], "logprob_start_len": 0},
        {"sampling_params": {"frequency_penalty": 1.0, "max_new_tokens": 12}},
        {"sampling_params": {"temperature": 1.3, "top_k": 5, "max_new_tokens": 12}},
        {"sampling_params": {"logit_bias": {"7": 5.0}, "max_new_tokens": 12}},
    ],
    ids=json.dumps,
)
def test_what_a_client_may_ask_changes_no_token_and_ends_nothing(stock, extra: dict) -> None:
    plain = stock.generate(**_body("once upon a time", 12))["output_ids"]
    sampling = {"ignore_eos": True, "max_new_tokens": 12, **extra.get("sampling_params", {})}

    answer = stock.generate("once upon a time", **{**extra, "sampling_params": sampling})

    assert answer["output_ids"] == plain
    if "return_logprob" in extra:
        assert len(answer["meta_info"]["output_token_logprobs"]) == 12
    stock.assert_idle_and_balanced()


def test_the_time_in_which_the_device_is_busy_is_counted(stock) -> None:
    stock.generate(**_body("some work", 20))
    text = stock.http.get("/metrics").text
    (line,) = (ln for ln in text.splitlines() if ln.startswith(f"{BUSY_METRIC}_total"))

    assert float(line.split()[-1]) > 0
