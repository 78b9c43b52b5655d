"""Real engines on the CPU platform: the same greedy fp32 tokens, whatever the attention backend."""

from __future__ import annotations

import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest

from support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("no_other_server")]

POOL_TOKENS = 2048
PROMPT_TOKENS = 700  # a tiny model's token is a byte


def _prompt(seed: int, tokens: int = PROMPT_TOKENS) -> str:
    letters = random.Random(seed)
    return "".join(letters.choices(string.ascii_letters + " ", k=tokens))


# Lengths around a block and a chunk; the second round extends cached prefixes.
SHORT = [_prompt(seed, tokens) for seed, tokens in enumerate((1, 17, 128, 129, 300))]
ROUNDS = [SHORT, [prompt + " and then" for prompt in SHORT]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("qwen3"), arch="qwen3")


def _generate(model: Path, rounds: list[list[str]], **engine: object) -> list[list[dict]]:
    job = {"engine": {"model_path": str(model), **engine}, "rounds": rounds, "new_tokens": 24}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SGLANG_", "CONSERVE_"))}
    kept["SGLANG_DISABLED_MODEL_ARCHS"] = os.environ["SGLANG_DISABLED_MODEL_ARCHS"]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("generate.py")), json.dumps(job)],
        env=kept | {"SGLANG_PLATFORM": "conserve_cpu"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def _tokens(rounds: list[list[dict]]) -> list[list[list[int]]]:
    return [[reply["tokens"] for reply in replies] for replies in rounds]


LONG = [[str(seed) + _prompt(seed)] for seed in range(6)]  # no two of all share a prefix


@pytest.fixture(scope="module")
def ours(model: Path) -> list[list[dict]]:
    """`ROUNDS`, then `LONG` twice, of one engine with chunks, mixed steps and a host cache."""
    return _generate(
        model,
        [*ROUNDS, *LONG, *LONG],
        enable_mixed_chunk=True,
        chunked_prefill_size=64,
        enable_hierarchical_cache=True,
        hicache_ratio=4.0,
        max_total_tokens=POOL_TOKENS,
    )


def test_tokens_equal_torch_natives(model: Path, ours: list[list[dict]]) -> None:
    native = _generate(
        model, ROUNDS, attention_backend="torch_native", disable_overlap_schedule=True
    )
    assert _tokens(ours[: len(ROUNDS)]) == _tokens(native)


def test_hicache_reads_back_more_than_the_device_holds(ours: list[list[dict]]) -> None:
    replies = ours[len(ROUNDS) :]
    first, again = replies[: len(LONG)], replies[len(LONG) :]
    assert sum(reply["cached_tokens"] for [reply] in first) == 0
    assert sum(reply["cached_tokens"] for [reply] in again) > POOL_TOKENS
    assert _tokens(again) == _tokens(first)
