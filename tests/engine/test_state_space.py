"""A model with state-space layers through preemptions and sitting out: SGLang, a tiny Qwen3-Next.

What `test_sliding_windows.py` does to windows. A state is that of one position of one request: if a
row lost it, shared it or went on from another position's, its tokens would be others.
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
from support.server import OFFLINE, Server, until

pytestmark = pytest.mark.engine

PREEMPTIONS = 20


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
    has = served.server.capabilities()
    assert has == {"sitting out": True, "slices": False, "checkpoints": True, "host copies": False}
    log = served.server.process.log_path.read_text()
    assert f"max_running_requests is capped to {ROWS} by the mamba state cache" in log


def test_tokens_are_those_of_transformers(served) -> None:
    """The gated delta nets of the CPU platform are the model's."""
    assert_tokens_are_those_of_transformers(served.server, served.folder)
