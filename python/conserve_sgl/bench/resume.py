"""What coming back costs a preempted request: its context from the host cache, or computed again.

    python -m conserve_sgl.bench.resume --model DIR [-- SGLANG FLAGS]

The server is a real one with HiCache and a device pool that holds little more than one context,
so that computing the next context moves the previous one to the host. Prints Markdown:
milliseconds to the first token, over HTTP.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import msgspec

from conserve_sgl.bench.server import serving, split_flags
from conserve_sgl.bench.tables import markdown

__all__ = ["CONTEXT_TOKENS", "ResumeRow", "main", "measure_resume", "server_flags", "table"]

CONTEXT_TOKENS = (1024, 4096, 8000)
"""Contexts that are measured; the last fits a model with 8,192 positions."""

_POOL_MARGIN_TOKENS = 640
_FIRST_TOKEN_ID, _TOKEN_IDS = 1000, 20_000
_TIMEOUT_S = 300
_CONFIG = "slices: {enabled: false}"


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
    """SGLang flags for a server whose host cache holds all of `contexts`.

    The device pool holds the longest and a little more.
    """
    pool = max(contexts) + _POOL_MARGIN_TOKENS
    return [
        f"--max-total-tokens={pool}",
        "--enable-hierarchical-cache",
        "--hicache-write-policy=write_through",
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


def table(rows: Sequence[ResumeRow]) -> str:
    """The rows as a Markdown table."""
    return markdown(
        [
            {
                "context tokens": f"{r.context_tokens:,}",
                "computed again": f"{r.recompute_ms:,.0f} ms",
                "resumed": f"{r.resume_ms:,.0f} ms",
                "times cheaper": f"{r.times_cheaper:.1f}",
                "found": f"{r.found_tokens:,}",
                "on the host": f"{r.found_on_host:,}",
            }
            for r in rows
        ]
    )


def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(description="Resuming a context against computing it again.")
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXT_TOKENS))
    options, flags = split_flags(argv)
    args = parser.parse_args(options)
    flags = ["--chunked-prefill-size=512", *server_flags(args.contexts), *flags]
    with serving(args.model, _CONFIG, flags) as server:
        print(table(list(measure_resume(server.base_url, args.contexts))), end="")


if __name__ == "__main__":
    main()
