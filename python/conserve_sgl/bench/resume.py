"""What coming back costs a preempted request: its context from the host cache, or computed again.

The server is a real one with HiCache and a device pool that holds little more than one context,
so that computing the next context moves the previous one to the host.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

import httpx
import msgspec

__all__ = ["CONTEXT_TOKENS", "ResumeRow", "measure_resume", "server_flags"]

CONTEXT_TOKENS = (1024, 4096, 8000)
"""Contexts that are measured; the last fits a model with 8,192 positions."""

_POOL_MARGIN_TOKENS = 640
_FIRST_TOKEN_ID, _TOKEN_IDS = 1000, 20_000
_TIMEOUT_S = 300


class ResumeRow(msgspec.Struct, frozen=True):
    """One context, both ways.

    Args:
        context_tokens: prompt and output that the request had.
        recompute_ms: first token after computing all of it.
        resume_ms: first token after loading it from the host.
        found_tokens: what the resume found in the cache.
        found_on_host: of these, what came from host memory.
    """

    context_tokens: int
    recompute_ms: float
    resume_ms: float
    found_tokens: int
    found_on_host: int

    @property
    def times_cheaper(self) -> float:
        """Recomputing over resuming."""
        return self.recompute_ms / self.resume_ms


def server_flags(contexts: Sequence[int] = CONTEXT_TOKENS) -> list[str]:
    """SGLang flags for a server on a CPU whose host cache holds all of `contexts`.

    The device pool holds the longest and a little more.
    """
    pool = max(contexts) + _POOL_MARGIN_TOKENS
    return [
        f"--max-total-tokens={pool}",
        "--enable-hierarchical-cache",
        "--hicache-write-policy=write_through",
        "--hicache-io-backend=direct",
        "--hicache-mem-layout=layer_first",
        f"--hicache-ratio={-(-sum(contexts) // pool) + 1}",
    ]


def measure_resume(
    base_url: str, contexts: Sequence[int] = CONTEXT_TOKENS, *, seed: int = 0
) -> Iterator[ResumeRow]:
    """Compute every context, shortest first, then come back to each.

    Args:
        base_url: of a server started with `server_flags(contexts)` that does nothing else.
        contexts: tokens, rising.
        seed: of the token ids.
    """
    chance = random.Random(seed)
    prompts = [
        [_FIRST_TOKEN_ID + chance.randrange(_TOKEN_IDS) for _ in range(tokens)]
        for tokens in contexts
    ]
    with httpx.Client(base_url=base_url, timeout=_TIMEOUT_S) as http:
        _first_token(http, prompts[0][:64])  # what a first request compiles and allocates
        recompute_ms = [_first_token(http, prompt)[0] for prompt in prompts]
        for prompt, cold_ms in zip(prompts, recompute_ms, strict=True):
            resume_ms, meta = _first_token(http, prompt)
            yield ResumeRow(
                context_tokens=len(prompt),
                recompute_ms=cold_ms,
                resume_ms=resume_ms,
                found_tokens=meta["cached_tokens"],
                found_on_host=(meta.get("cached_tokens_details") or {}).get("host", 0),
            )


def _first_token(http: httpx.Client, input_ids: list[int]) -> tuple[float, dict]:
    """Milliseconds to the only token, and the answer's `meta_info`."""
    sampling = {"temperature": 0, "max_new_tokens": 1}
    start = time.perf_counter()
    answer = http.post("/generate", json={"input_ids": input_ids, "sampling_params": sampling})
    took_ms = (time.perf_counter() - start) * 1e3
    return took_ms, answer.raise_for_status().json()["meta_info"]
