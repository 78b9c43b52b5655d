"""What coming back costs a preempted request: its context from the host cache, or computed again.

    python -m conserve_sgl.bench.micro.resume --model DIR [--out DIR] [-- SGLANG FLAGS]

The server is a real one with HiCache and a device pool that holds little more than one context.
Every context is computed, pushed out to the host by a filler, and asked for again: then it comes
from the host. Asked for once more it is on the device still: that costs all that is not the copy
(the request itself, and a step of one token). Each several times, after a round that is thrown
away; medians count. Prints Markdown: milliseconds to the first token, over HTTP.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import msgspec

from conserve_sgl.bench.report.tables import markdown
from conserve_sgl.bench.systems.server import serving, split_flags

__all__ = ["CONTEXT_TOKENS", "ResumeRow", "main", "measure_resume", "server_flags", "table"]

CONTEXT_TOKENS = (1024, 4096, 8000)
"""Contexts that are measured; the last fits a model with 8,192 positions."""

_POOL_MARGIN_TOKENS = 640
_FIRST_TOKEN_ID, _TOKEN_IDS = 1000, 20_000
_TIMEOUT_S = 300
_FILLERS = 2
_KV_BYTES = 2  # of a number in the KV cache; the flags leave it in the 16 bits of the weights
_CONFIG = "slices: {enabled: false}"


class ResumeRow(msgspec.Struct, frozen=True):
    """One context, in every way; medians.

    Args:
        context_tokens: prompt and output that the request had.
        recompute_ms: first token after computing all of it.
        resume_ms: first token after loading it from the host.
        resident_ms: first token with all of it on the device.
        found_tokens: what the resume found in the cache.
        found_on_host: of these, what came from host memory.
        host_bytes: how much that is; 0 if the model's geometry is not known.
    """

    context_tokens: int
    recompute_ms: float
    resume_ms: float
    resident_ms: float
    found_tokens: int
    found_on_host: int
    host_bytes: int = 0

    @property
    def times_cheaper(self) -> float:
        """Recomputing over resuming."""
        return self.recompute_ms / self.resume_ms

    @property
    def copied_gb_per_s(self) -> float | None:
        """From the host, over the time that a resume takes longer than a request whose context
        is there; None where it takes none, or nothing was copied."""
        copy_ms = self.resume_ms - self.resident_ms
        return self.host_bytes / copy_ms / 1e6 if copy_ms > 0 and self.host_bytes else None


def server_flags(contexts: Sequence[int] = CONTEXT_TOKENS) -> list[str]:
    """SGLang flags for a server whose host cache holds all of `contexts` and the fillers.

    The device pool holds the longest and a little more.
    """
    pool = max(contexts) + _POOL_MARGIN_TOKENS
    hold = sum(contexts) + _FILLERS * pool
    return [
        f"--max-total-tokens={pool}",
        "--enable-hierarchical-cache",
        "--hicache-write-policy=write_through",
        f"--hicache-ratio={-(-hold // pool) + 1}",
    ]


def measure_resume(
    base_url: str,
    contexts: Sequence[int] = CONTEXT_TOKENS,
    *,
    rounds: int = 3,
    bytes_per_token: int = 0,
    seed: int = 0,
) -> Iterator[ResumeRow]:
    """Compute every context anew in each round, push it out, and come back to it.

    Args:
        base_url: of a server started with `server_flags(contexts)` that does nothing else.
        contexts: tokens.
        rounds: that count; one more before them is thrown away.
        bytes_per_token: of KV.
        seed: of the token ids.
    """
    chance = random.Random(seed)

    def prompt(tokens: int) -> list[int]:
        return [_FIRST_TOKEN_ID + chance.randrange(_TOKEN_IDS) for _ in range(tokens)]

    with httpx.Client(base_url=base_url, timeout=_TIMEOUT_S) as http:
        fillers = [prompt(max(contexts)) for _ in range(_FILLERS)]
        for tokens in contexts:
            times: list[tuple[float, float, float]] = []
            for _ in range(1 + rounds):
                ids = prompt(tokens)
                recompute_ms, _ = _first_token(http, ids)
                for filler in fillers:
                    _first_token(http, filler)
                resume_ms, meta = _first_token(http, ids)
                resident_ms, _ = _first_token(http, ids)
                times.append((recompute_ms, resume_ms, resident_ms))
            of_host = (meta.get("cached_tokens_details") or {}).get("host", 0)
            recompute_ms, resume_ms, resident_ms = map(
                statistics.median, zip(*times[1:], strict=True)
            )
            yield ResumeRow(
                context_tokens=tokens,
                recompute_ms=recompute_ms,
                resume_ms=resume_ms,
                resident_ms=resident_ms,
                found_tokens=meta["cached_tokens"],
                found_on_host=of_host,
                host_bytes=of_host * bytes_per_token,
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
                "on the device still": f"{r.resident_ms:,.0f} ms",
                "copied": "-" if (rate := r.copied_gb_per_s) is None else f"{rate:,.1f} GB/s",
            }
            for r in rows
        ]
    )


def _bytes_per_token(model: Path) -> int:
    """Of KV, by the config.json in the model's folder; 0 if it does not say."""
    try:
        config = json.loads((model / "config.json").read_bytes())
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        return 2 * config["num_hidden_layers"] * kv_heads * head_dim * _KV_BYTES
    except (OSError, ValueError, KeyError):
        return 0


def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(description="Resuming a context against computing it again.")
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXT_TOKENS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a folder for table, figures and server log")
    options, flags = split_flags(argv)
    args = parser.parse_args(options)
    log = None if args.out is None else args.out / "server.log"
    flags = [*server_flags(args.contexts), *flags]
    with serving(args.model, _CONFIG, flags, log_path=log) as server:
        measured = measure_resume(
            server.base_url,
            args.contexts,
            rounds=args.rounds,
            bytes_per_token=_bytes_per_token(args.model),
        )
        rows = list(measured)
    print(table(rows), end="")
    if args.out is not None:
        (args.out / "resume.md").write_text(table(rows), "utf-8")
        (args.out / "resume.json").write_bytes(msgspec.json.encode(rows))


if __name__ == "__main__":
    main()
