"""Models with sliding windows through preemptions, sitting out and suspended prefills.

What `test_mixture_of_experts.py` does to experts. SGLang keeps the KV of layers with a window in
a pool of their own, which is smaller, and lets go of what the window has passed: a request that
sits out or gives way must find the rest of it when it comes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import msgspec
import pytest

from support.alone import (
    CONFIG,
    LAYERS,
    PROMPTS,
    assert_tokens_are_those_of_transformers,
    generate,
)
from support.server import HICACHE, OFFLINE, Server, until

pytestmark = pytest.mark.engine

PREEMPTIONS, SUSPENSIONS = 20, 20


class Windowed(msgspec.Struct, frozen=True):
    """A model, and what SGLang can do with it.

    has_pool: whether its windows have a pool of their own.
    seed: one by which no two experts of a token are so near that rounding decides between them.
    """

    arch: str
    in_layers: bool
    has_pool: bool
    flags: tuple[str, ...]
    seed: int = 0


WINDOWED = (
    Windowed("gemma3_causal", False, has_pool=False, flags=("--disable-overlap-schedule",)),
    Windowed("mellum", True, has_pool=True, flags=(*HICACHE, "--hicache-ratio=4")),
    # In a fifth of the room it is the windows that run out of KV.
    Windowed("gpt_oss", False, has_pool=True, flags=("--swa-full-tokens-ratio=0.2",)),
)


class Served(msgspec.Struct):
    model: Windowed
    folder: Path
    server: Server


@pytest.fixture(scope="module", params=WINDOWED, ids=lambda model: model.arch)
def served(request, start_server, tmp_path_factory) -> Iterator[Served]:
    from support.tiny_models import make_tiny_model  # imports transformers, for the engine tier

    model = request.param
    folder = tmp_path_factory.mktemp(model.arch)
    make_tiny_model(folder, arch=model.arch, layers=LAYERS, seed=model.seed)
    env = {
        "CONSERVE_TEST_PREEMPT": "7:0.03",
        "CONSERVE_TEST_FORCE_YIELD": "7:0.5",
        "CONSERVE_TEST_OWNERSHIP": "1",
        "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16",
        "SGLANG_SWA_EVICTION_INTERVAL": "8",
    }
    flags = ("--max-total-tokens=1280", *model.flags)
    with start_server(folder, *flags, config=CONFIG, env=env) as server:
        yield Served(model, folder, server)


def test_offline_tokens_are_those_of_a_run_alone(served) -> None:
    """Preempted, sitting out and suspended, beside online requests all along."""
    server = served.server
    alone = generate(server, at_once=1)
    assert len(set(alone)) == len(PROMPTS)

    def met_enough(state: dict) -> bool:
        return (
            state["offline_preempted"] >= PREEMPTIONS
            and state["offline_rows_parked"] > 0
            and (state["slices"]["suspensions"] >= SUSPENSIONS or not served.model.in_layers)
        )

    while not met_enough(state := server.state()):
        work = partial(generate, server, at_once=len(PROMPTS), headers=OFFLINE)
        assert server.beside_online(work, "an online question?") == alone
    assert state["checkpoint"]["restored_tokens"] > state["checkpoint"]["recomputed_tokens"]
    until(lambda: server.state()["checkpoint"]["pinned_tokens"] == 0)
    server.assert_idle_and_balanced()


def test_the_state_says_what_the_server_has(served) -> None:
    """The log too, once; and SGLang has made the pool that the test is about."""
    has = served.server.capabilities()
    assert has == {
        "sitting out": True,
        "slices": served.model.in_layers,
        "checkpoints": True,
        "host copies": "--enable-hierarchical-cache" in served.model.flags,
    }
    log = served.server.process.log_path.read_text()
    assert log.count("capabilities of this model") == 1
    assert ("sliding window memory pool" in log) == served.model.has_pool


def test_tokens_are_those_of_transformers(served) -> None:
    """The windows of the CPU's attention are the model's, sinks included."""
    assert_tokens_are_those_of_transformers(served.server, served.folder)
