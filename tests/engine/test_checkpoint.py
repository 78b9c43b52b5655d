"""Offline requests that give way again and again, and keep every token: SGLang, tiny model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.engine

CONFIG = """
offline: {queue_requests: 64}
budget: {step_tokens: 128, resident_rows: 12, rows_beside_online: 4}
memory: {online_reserve: 0.0}
checkpoint: {stride_tokens: 16}
"""
HICACHE = (
    "--enable-hierarchical-cache",
    "--hicache-write-policy=write_through",
    "--hicache-io-backend=direct",
    "--hicache-mem-layout=layer_first",
    "--hicache-ratio=4",
)
NO_OVERLAP = "--disable-overlap-schedule"
OFFLINE = {"x-sgl-conserve-class": "offline"}
PROMPTS = [
    f"{i}: " + "the quick brown fox jumps over the lazy dog. " * (1 + i % 4) for i in range(16)
]
SERVERS = {
    "overlap": (),
    "no-overlap": (NO_OVERLAP,),
    "hicache": HICACHE,
    "hicache-no-overlap": (*HICACHE, NO_OVERLAP),
}


@pytest.fixture(scope="module", params=SERVERS)
def server(request, start_server, tiny_llama) -> Iterator:
    env = {"CONSERVE_TEST_PREEMPT": "7:0.03", "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16"}
    flags = (*SERVERS[request.param], "--max-total-tokens=2048")
    with start_server(tiny_llama, *flags, config=CONFIG, env=env) as server:
        yield server


def test_every_token_survives_hundreds_of_preemptions(server):
    sampling = {"max_new_tokens": 200}
    alone = server.generate_all(PROMPTS, sampling_params=sampling)
    before = server.state()
    for _ in range(2):
        assert server.generate_all(PROMPTS, sampling_params=sampling, headers=OFFLINE) == alone
    after = server.state()
    print(after)
    assert after["offline_preempted"] >= before["offline_preempted"] + 100
    server.assert_idle_and_balanced()
