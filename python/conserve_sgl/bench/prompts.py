"""Bodies for SGLang's `/generate`, of exactly the lengths that an arrival asks for.

Prompts are random token ids, so every one begins differently and none is served from the prefix
cache by accident; `ignore_eos` makes the engine write the trace's number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from conserve_sgl.bench.arrivals import Arrival

__all__ = ["TimedRequest", "TokenIds", "timed_requests"]


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
    arrivals: Sequence[Arrival], ids: TokenIds, seed: int | Sequence[int]
) -> tuple[TimedRequest, ...]:
    """One streaming `/generate` request for each arrival; another seed, other prompts."""
    rng = np.random.default_rng(seed)
    return tuple(TimedRequest(arrival, _body(arrival, ids, rng)) for arrival in arrivals)


def _body(arrival: Arrival, ids: TokenIds, rng: np.random.Generator) -> bytes:
    return msgspec.json.encode(
        {
            "input_ids": rng.integers(ids.low, ids.high, arrival.prompt_tokens).tolist(),
            "sampling_params": {
                "max_new_tokens": arrival.output_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
            },
            "stream": True,
        }
    )
