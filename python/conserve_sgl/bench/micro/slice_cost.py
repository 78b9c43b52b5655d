"""What layer slices cost when nothing interrupts them: sliced against plain prefill.

    python -m conserve_sgl.bench.micro.slice_cost --model DIR [--out DIR] [-- SGLANG FLAGS]

Starts one server and asks it for one token after random prompts of a length, in turns as online
requests, whose prefill is never sliced, and as offline ones. Then short online requests arrive, one
after the other, while prompts of the greatest length are prefilled offline all along. Prints
Markdown: prompt tokens per second of the median, over HTTP; how many slices a prefill took; how
long arrivals waited for the slice that ran, and for their first token. With `--unsliced` slices are
off, and only arrivals are measured: what they would wait otherwise.
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np

from conserve_sgl.bench.report.tables import markdown
from conserve_sgl.bench.systems.server import serving, split_flags
from conserve_sgl.client.headers import OFFLINE_HEADERS

__all__ = ["Measured", "Met", "main", "table", "yields"]

_LENGTHS = (512, 2048, 8192)
_CONFIG = """
slo: {{yield_ms: {yield_ms}}}
slices: {{enabled: {enabled}}}
memory: {{online_reserve: 0.0}}
"""
_OFFLINE_AT_ONCE = 2
_SLOWEST_ANSWER_S = 300.0
_SHORT = 16
_LONGEST_PAUSE_S = 0.1
# Of any tokenizer: far from the special tokens of either end of a vocabulary.
_TOKEN_IDS = range(100, 30_000)


class Measured(msgspec.Struct, frozen=True):
    """One prompt length.

    Args:
        tokens: of the prompt.
        plain_s: median seconds of an unsliced request.
        sliced_s: median seconds of a sliced one.
        slices: of one sliced prefill, on average.
    """

    tokens: int
    plain_s: float
    sliced_s: float
    slices: float


def table(rows: list[Measured]) -> str:
    """The rows as a Markdown table."""
    return markdown(
        [
            {
                "prompt tokens": f"{r.tokens:,}",
                "plain tok/s": f"{r.tokens / r.plain_s:,.0f}",
                "sliced tok/s": f"{r.tokens / r.sliced_s:,.0f}",
                "sliced / plain": f"{r.plain_s / r.sliced_s:.3f}",
                "slices": f"{r.slices:.0f}",
            }
            for r in rows
        ]
    )


class Met(msgspec.Struct, frozen=True):
    """Short online requests, alone and beside offline prefills.

    Args:
        alone_s: seconds to the only token of each that was alone.
        beside_s: of each that met offline prefills.
        offline_prompts: that were prefilled meanwhile.
        slices: what the server says of its slices.
    """

    alone_s: list[float]
    beside_s: list[float]
    offline_prompts: int
    slices: dict[str, Any]


def yields(met: Met) -> str:
    """What arrivals waited for, in two lines."""
    slices, waited_ms = met.slices, met.slices["arrival_to_yield_ms"]
    return (
        f"{len(met.beside_s)} arrivals beside {met.offline_prompts} offline prefills, "
        f"{slices['suspensions']} suspensions; arrival to yield {waited_ms['p50']:.1f} ms (P50), "
        f"{waited_ms['p99']:.1f} ms (P99), {waited_ms['longest']:.1f} ms (longest); "
        f"{slices['layers_computed']} layers computed in {slices['batches_sliced']} prefills\n"
        f"their first token: {_spread(met.beside_s)}; alone: {_spread(met.alone_s)}\n"
    )


def _spread(seconds: list[float]) -> str:
    p50, p99 = (1e3 * value for value in np.percentile(seconds, (50, 99)))
    return f"{p50:.1f} ms (P50), {p99:.1f} ms (P99), {1e3 * max(seconds):.1f} ms (longest)"


class _Client:
    def __init__(self, base_url: str) -> None:
        self._http = httpx.Client(base_url=base_url, timeout=_SLOWEST_ANSWER_S)
        self._random = random.Random(0)

    def seconds(self, tokens: int, headers: dict[str, str] | None = None) -> float:
        """One prompt of `tokens` random tokens that no other prompt shares."""
        body = {
            "input_ids": self._random.choices(_TOKEN_IDS, k=tokens),
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
        }
        start_s = time.perf_counter()
        self._http.post("/generate", json=body, headers=headers).raise_for_status()
        return time.perf_counter() - start_s

    def slices(self) -> dict[str, Any]:
        info = self._http.get("/server_info").raise_for_status().json()
        return info["internal_states"][0]["conserve"]["slices"]

    def interrupt(self, tokens: int, arrivals: int) -> Met:
        """`arrivals` online requests, one after the other, first alone and then while prompts of
        `tokens` are prefilled offline all along."""
        alone = [self._arrival() for _ in range(arrivals)]
        done = threading.Event()

        def prefill() -> int:
            prompts = 0
            while not done.is_set():
                self.seconds(tokens, OFFLINE_HEADERS)
                prompts += 1
            return prompts

        with ThreadPoolExecutor(_OFFLINE_AT_ONCE) as pool:
            offline = [pool.submit(prefill) for _ in range(_OFFLINE_AT_ONCE)]
            try:
                beside = [self._arrival() for _ in range(arrivals)]
            finally:
                done.set()
            prompts = sum(future.result() for future in offline)
        return Met(alone, beside, prompts, self.slices())

    def _arrival(self) -> float:
        time.sleep(self._random.uniform(0.0, _LONGEST_PAUSE_S))
        return self.seconds(_SHORT)

    def measure(self, tokens: int, repeats: int) -> Measured:
        self.seconds(tokens, OFFLINE_HEADERS)  # warm, and the time of a layer is learned
        before = self.slices()
        plain, sliced = [], []
        for _ in range(repeats):
            plain.append(self.seconds(tokens))
            sliced.append(self.seconds(tokens, OFFLINE_HEADERS))
        slices = (self.slices()["slices"] - before["slices"]) / repeats
        return Measured(tokens, statistics.median(plain), statistics.median(sliced), slices)


def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(description="Sliced against plain prefill.")
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--yield-ms", type=float, default=5.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(_LENGTHS))
    parser.add_argument("--arrivals", type=int, default=60)
    parser.add_argument("--unsliced", action="store_true")
    parser.add_argument("--out", type=Path, help="a folder for table, figures and server log")
    options, flags = split_flags(argv)
    args = parser.parse_args(options)
    longest = max(args.lengths)
    flags = [
        *("--disable-radix-cache", f"--context-length={longest + 16}"),
        *(f"--chunked-prefill-size={longest}", f"--max-total-tokens={3 * longest}"),
        *flags,
    ]
    env = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    config = _CONFIG.format(yield_ms=args.yield_ms, enabled=str(not args.unsliced).lower())
    log = None if args.out is None else args.out / "server.log"
    with serving(args.model, config, flags, env, log_path=log) as server:
        client = _Client(server.base_url)
        lengths = [] if args.unsliced else args.lengths
        rows = [client.measure(tokens, args.repeats) for tokens in lengths]
        client.seconds(longest, OFFLINE_HEADERS)  # warm, where no length was measured
        met = client.interrupt(longest, args.arrivals)
    text = f"{table(rows)}\n{yields(met)}" if rows else yields(met)
    print(text, end="")
    if args.out is not None:
        (args.out / "slice_cost.md").write_text(text, "utf-8")
        (args.out / "slice_cost.json").write_bytes(msgspec.json.encode({"rows": rows, "met": met}))


if __name__ == "__main__":
    main()
