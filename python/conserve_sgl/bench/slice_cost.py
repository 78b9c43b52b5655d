"""What layer slices cost when nothing interrupts them: sliced against plain prefill.

    python -m conserve_sgl.bench.slice_cost --model DIR [-- SGLANG FLAGS]

Starts one server and asks it for one token after random prompts of a length, in turns as online
requests, whose prefill is never sliced, and as offline ones. Then short online requests arrive one
after the other while the longest prompt is prefilled offline. Prints Markdown: prompt tokens per
second of the median, over HTTP; how many slices a prefill took; how long arrivals waited for the
slice that ran.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec

from conserve_sgl.bench.server import serving, split_flags
from conserve_sgl.bench.tables import markdown
from conserve_sgl.jobs.client import OFFLINE_HEADERS

__all__ = ["Measured", "main", "table"]

_LENGTHS = (512, 2048, 8192)
_CONFIG = """
slo: {{yield_ms: {yield_ms}}}
memory: {{online_reserve: 0.0}}
"""
_SLOWEST_ANSWER_S = 300.0
_SHORT = 16
_LONGEST_PAUSE_S = 0.3
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


def yields(arrivals: int, slices: dict[str, Any]) -> str:
    """What the server says of `arrivals` online requests that met a sliced prefill."""
    waited_ms = slices["arrival_to_yield_ms"]
    return (
        f"{arrivals} arrivals, {slices['suspensions']} suspensions; arrival to yield "
        f"{waited_ms['p50']:.1f} ms (P50), {waited_ms['p99']:.1f} ms (P99); "
        f"{slices['layers_computed']} layers computed in {slices['batches_sliced']} prefills"
    )


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

    def interrupt(self, tokens: int) -> int:
        """Online requests while one prompt of `tokens` is prefilled offline; how many they were."""
        with ThreadPoolExecutor(1) as pool:
            offline = pool.submit(self.seconds, tokens, OFFLINE_HEADERS)
            arrivals = 0
            while not offline.done():
                self.seconds(_SHORT)
                time.sleep(self._random.uniform(0.0, _LONGEST_PAUSE_S))
                arrivals += 1
            offline.result()
        return arrivals

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
    options, flags = split_flags(argv)
    args = parser.parse_args(options)
    longest = max(args.lengths)
    flags = [
        *("--disable-radix-cache", f"--context-length={longest + 16}"),
        *(f"--chunked-prefill-size={longest}", f"--max-total-tokens={3 * longest}"),
        *flags,
    ]
    env = {"SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    with serving(args.model, _CONFIG.format(yield_ms=args.yield_ms), flags, env) as server:
        client = _Client(server.base_url)
        print(table([client.measure(tokens, args.repeats) for tokens in args.lengths]), end="")
        arrivals = client.interrupt(longest)
        print(f"\n{yields(arrivals, client.slices())}")


if __name__ == "__main__":
    main()
