"""A model with state-space layers through preemptions and sitting out: SGLang, a tiny Qwen3-Next.

What `test_sliding_windows.py` does to windows. A state is that of one position of one request: if a
row lost it, shared it or went on from another position's, its tokens would be others.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import pytest

from support.server import OFFLINE, Server, until

pytestmark = pytest.mark.engine

CONFIG = """
slo: {ttft: 1x, tpot: 1x, yield_ms: 1}
memory: {online_reserve: 0.0}
checkpoint: {stride_tokens: 16}
"""
LAYERS = 4
PREEMPTIONS = 20
TOKENS = 64
PROMPTS = [
    f"{i}: " + "the quick brown fox jumps over the dog. " * (1 + 3 * i % 5) for i in range(10)
]


class Strategy(msgspec.Struct, frozen=True):
    """How SGLang keeps states for its radix tree, and how it is asked for.

    slots_per_row: that it counts on.
    """

    name: str
    slots_per_row: int
    flags: tuple[str, ...]


STRATEGIES = (
    Strategy("no_buffer", 3, ("--disable-overlap-schedule",)),
    Strategy("extra_buffer", 5, ("--mamba-track-interval=64",)),
)
ROWS = 6


class Served(msgspec.Struct):
    strategy: Strategy
    folder: Path
    server: Server


@pytest.fixture(scope="module", params=STRATEGIES, ids=lambda strategy: strategy.name)
def served(request, start_server, tmp_path_factory) -> Iterator[Served]:
    from support.tiny_models import make_tiny_model  # imports transformers, for the engine tier

    strategy = request.param
    folder = tmp_path_factory.mktemp(strategy.name)
    make_tiny_model(folder, arch="qwen3_next", layers=LAYERS)
    env = {
        "CONSERVE_TEST_PREEMPT": "7:0.03",
        "CONSERVE_TEST_OWNERSHIP": "1",
        "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16",
    }
    slots = f"--max-mamba-cache-size={ROWS * strategy.slots_per_row}"
    flags = ("--max-total-tokens=1280", slots, *strategy.flags)
    with start_server(folder, *flags, config=CONFIG, env=env) as server:
        yield Served(strategy, folder, server)


def generate(server: Server, at_once: int, headers: dict[str, str] | None = None) -> list[str]:
    sampling = {"max_new_tokens": TOKENS}
    with ThreadPoolExecutor(at_once) as pool:
        answers = pool.map(
            lambda text: server.generate(text, sampling_params=sampling, headers=headers), PROMPTS
        )
        return [answer["text"] for answer in answers]


def test_offline_tokens_are_those_of_a_run_alone(served) -> None:
    """Preempted and sitting out, beside online requests all along, which find states kept by
    offline ones; and no slot is lost."""
    server = served.server
    alone = generate(server, at_once=1)
    assert len(set(alone)) == len(PROMPTS)

    def met_enough(state: dict) -> bool:
        return (
            state["offline_preempted"] >= PREEMPTIONS
            and state["offline_rows_parked"] > 0
            and state["checkpoint"]["restored_tokens"] > 0
        )

    while not met_enough(server.state()):
        work = partial(generate, server, at_once=len(PROMPTS), headers=OFFLINE)
        assert server.beside_online(work, "an online question?") == alone
    assert generate(server, at_once=len(PROMPTS)) == alone
    until(lambda: server.state()["checkpoint"]["pinned_tokens"] == 0)
    server.assert_idle_and_balanced()


def test_the_state_says_what_the_server_has(served) -> None:
    """SGLang, too, has as many rows as there are slots for, and overlaps where states are copied
    beside the steps."""
    has = {
        capability["name"]: capability["on"] for capability in served.server.state()["capabilities"]
    }
    assert has == {"sitting out": True, "slices": False, "checkpoints": True, "host copies": False}
    log = served.server.process.log_path.read_text()
    assert f"max_running_requests is capped to {ROWS} by the mamba state cache" in log


def test_tokens_are_those_of_transformers(served) -> None:
    """The gated delta nets of the CPU platform are the model's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(served.folder)
    model = AutoModelForCausalLM.from_pretrained(served.folder)
    for prompt in PROMPTS[:3]:
        answer = served.server.generate(prompt, sampling_params={"max_new_tokens": TOKENS})
        reply = answer["output_ids"]
        asked = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([asked + reply])).logits[0, len(asked) - 1 : -1]
        assert len(reply) == TOKENS
        assert logits.argmax(-1).tolist() == reply
