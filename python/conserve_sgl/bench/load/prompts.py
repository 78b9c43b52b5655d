"""Bodies for SGLang's `/generate`, of exactly the lengths that an arrival asks for.

Prompts are random token ids, so every one begins differently and none is served from the prefix
cache by accident; only arrivals that name the same blocks share a beginning. `ignore_eos` makes
the engine write the trace's number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from conserve_sgl.bench.load.arrivals import Arrival

__all__ = [
    "OFFLINE_DRAW",
    "ONLINE_DRAW",
    "WARMUP_DRAW",
    "TimedRequest",
    "TokenIds",
    "generate_body",
    "timed_requests",
]

WARMUP_DRAW, ONLINE_DRAW, OFFLINE_DRAW = range(3)
"""Behind the seed of a benchmark: each draws other prompts from it."""


class TokenIds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ids that prompts are drawn from, low <= id < high.

    Low ids are special tokens in most vocabularies; the default fits those of 32,000 tokens and up.
    """

    low: int = 1000
    high: int = 30000

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high:
            raise ValueError("needs 0 <= low < high")


class TimedRequest(msgspec.Struct, frozen=True):
    """A request ready to go: `body` is encoded ahead, so that sending costs next to nothing."""

    arrival: Arrival
    body: bytes


def timed_requests(
    arrivals: Sequence[Arrival],
    ids: TokenIds,
    seed: int | Sequence[int],
    extra: Mapping[str, Any] | None = None,
) -> tuple[TimedRequest, ...]:
    """One streaming `/generate` request for each arrival; another seed, other prompts.

    `extra` fields go into every body.
    """
    draws = [seed] if isinstance(seed, int) else list(seed)
    rng = np.random.default_rng(draws)

    def prompt(arrival: Arrival) -> list[int]:
        shared = [
            np.random.default_rng([*draws, block]).integers(ids.low, ids.high, arrival.block_tokens)
            for block in arrival.blocks
        ]
        own = rng.integers(ids.low, ids.high, arrival.prompt_tokens)
        return np.concatenate([*shared, own])[: arrival.prompt_tokens].tolist()

    return tuple(
        TimedRequest(
            arrival,
            generate_body({"input_ids": prompt(arrival)}, arrival.output_tokens, extra or {}),
        )
        for arrival in arrivals
    )


def generate_body(
    prompt: Mapping[str, Any],
    output_tokens: int,
    extra: Mapping[str, Any],
    *,
    ignore_eos: bool = True,
    stream_interval: int | None = None,
) -> bytes:
    """A greedy, streaming request. With `stream_interval` a chunk comes every so many tokens."""
    sampling: dict[str, Any] = {
        "max_new_tokens": output_tokens,
        "temperature": 0.0,
        "ignore_eos": ignore_eos,
    }
    if stream_interval is not None:
        sampling["stream_interval"] = stream_interval
    return msgspec.json.encode({**prompt, "sampling_params": sampling, "stream": True, **extra})
