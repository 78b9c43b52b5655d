"""Mixtures of experts through preemptions and suspended prefills: SGLang, tiny models.

What `test_checkpoint.py` and `test_slices.py` do to a dense model. Which experts see a token is
decided by its hidden state, so whoever shares its step must not matter.
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


class Mixture(msgspec.Struct, frozen=True):
    """A model, the flags of its server, and whether SGLang can run its prefills layer by layer.

    seed: one by which the second and the third expert of a token are never within 1e-4 in these
        tests, so that no rounding decides between them.
    """

    arch: str
    class_name: str
    in_layers: bool
    flags: tuple[str, ...]
    seed: int = 0


MIXTURES = (
    Mixture("mixtral", "MixtralForCausalLM", False, ("--disable-overlap-schedule",), seed=1),
    Mixture("qwen3_moe", "Qwen3MoeForCausalLM", True, (*HICACHE, "--hicache-ratio=4")),
    Mixture("deepseek_v2", "DeepseekV2ForCausalLM", False, (*HICACHE, "--hicache-ratio=4")),
)


class Served(msgspec.Struct):
    mixture: Mixture
    folder: Path
    server: Server


@pytest.fixture(scope="module", params=MIXTURES, ids=lambda mixture: mixture.arch)
def served(request, start_server, tmp_path_factory) -> Iterator[Served]:
    from support.tiny_models import make_tiny_model  # imports transformers, for the engine tier

    mixture = request.param
    folder = tmp_path_factory.mktemp(mixture.arch)
    make_tiny_model(folder, arch=mixture.arch, layers=LAYERS, seed=mixture.seed)
    env = {
        "CONSERVE_TEST_PREEMPT": "7:0.03",
        "CONSERVE_TEST_FORCE_YIELD": "7:0.5",
        "CONSERVE_TEST_OWNERSHIP": "1",
        "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION": "16",
    }
    flags = ("--max-total-tokens=1280", *mixture.flags)
    with start_server(folder, *flags, config=CONFIG, env=env) as server:
        yield Served(mixture, folder, server)


def test_offline_tokens_are_those_of_a_run_alone(served) -> None:
    """Preempted, sitting out and suspended, beside online requests all along."""
    server = served.server
    alone = generate(server, at_once=1)
    assert len(set(alone)) == len(PROMPTS)

    def met_enough(state: dict) -> bool:
        return (
            state["offline_preempted"] >= PREEMPTIONS
            and state["offline_rows_parked"] > 0
            and (state["slices"]["suspensions"] >= SUSPENSIONS or not served.mixture.in_layers)
        )

    while not met_enough(state := server.state()):
        work = partial(generate, server, at_once=len(PROMPTS), headers=OFFLINE)
        assert server.beside_online(work, "an online question?") == alone
    assert state["checkpoint"]["restored_tokens"] > state["checkpoint"]["recomputed_tokens"]
    until(lambda: server.state()["checkpoint"]["pinned_tokens"] == 0)
    server.assert_idle_and_balanced()


def test_prefills_are_sliced_where_the_model_can_be_split(served) -> None:
    """Each layer of each prefill once; or no slice, and a line in the log."""
    generate(served.server, at_once=len(PROMPTS), headers=OFFLINE)
    slices = served.server.state()["slices"]
    done = slices["batches_sliced"] * LAYERS + slices["layers_given_up"]
    assert slices["layers_computed"] == done
    assert (slices["batches_sliced"] > 0) == served.mixture.in_layers
    said = f"{served.mixture.class_name} has no forward_split_prefill"
    log = served.server.process.log_path.read_text()
    assert log.count(said) == (not served.mixture.in_layers)


def test_tokens_are_those_of_transformers(served) -> None:
    """SGLang's experts on a CPU are the model's: what the other tests compare is not nonsense."""
    assert_tokens_are_those_of_transformers(served.server, served.folder)
