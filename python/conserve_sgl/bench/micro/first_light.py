"""Whether a server starts and answers both classes: the first thing to know on a new machine.

    python -m conserve_sgl.bench.micro.first_light --model DIR [-- SGLANG FLAGS]

Prints one JSON object: seconds until the server was ready, milliseconds a token for one request
alone and for many, whether the same prompt gives the same tokens twice, and what the server says
of its device.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from conserve_sgl.bench.systems.server import serving, split_flags
from conserve_sgl.client.headers import OFFLINE_HEADERS

__all__ = ["main"]

_TOKEN_IDS = range(100, 30_000)
_PROMPT_TOKENS, _OUTPUT_TOKENS, _TOGETHER = 128, 64, 32
_HTTP_S = 300.0
_SAID = ("version", "attention_backend", "sampling_backend", "max_total_num_tokens")


def _look(http: httpx.Client) -> dict[str, Any]:
    chance = random.Random(0)

    def answer(prompt: list[int], headers: dict[str, str] | None = None) -> list[int]:
        sampling = {"temperature": 0, "max_new_tokens": _OUTPUT_TOKENS, "ignore_eos": True}
        body = {"input_ids": prompt, "sampling_params": sampling}
        response = http.post("/generate", json=body, headers=headers).raise_for_status()
        return response.json()["output_ids"]

    def offline(prompt: list[int]) -> list[int]:
        return answer(prompt, OFFLINE_HEADERS)

    def prompt() -> list[int]:
        return chance.choices(_TOKEN_IDS, k=_PROMPT_TOKENS)

    def ms_per_token(work: Any) -> float:
        start_s = time.perf_counter()
        work()
        return round((time.perf_counter() - start_s) * 1e3 / _OUTPUT_TOKENS, 2)

    once = prompt()
    same = answer(once) == answer(once)
    same_offline = offline(once) == answer(once)
    alone = ms_per_token(lambda: answer(prompt()))
    prompts = [prompt() for _ in range(_TOGETHER)]
    with ThreadPoolExecutor(_TOGETHER) as pool:
        together = ms_per_token(lambda: list(pool.map(offline, prompts)))
    info = http.get("/server_info").raise_for_status().json()
    return {
        "ms_per_token_alone": alone,
        f"ms_per_token_of_{_TOGETHER}": together,
        "same_twice": same,
        "same_offline": same_offline,
        **{key: info.get(key) for key in _SAID},
        "offline_accepted": info["internal_states"][0]["conserve"]["offline_accepted"],
    }


def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(description="Whether a server starts and answers.")
    parser.add_argument("--model", required=True, type=Path)
    options, flags = split_flags(argv)
    args = parser.parse_args(options)
    start_s = time.perf_counter()
    with (
        serving(args.model, "{}", flags) as server,
        httpx.Client(base_url=server.base_url, timeout=_HTTP_S) as http,
    ):
        ready_s = round(time.perf_counter() - start_s, 1)
        print(json.dumps({"ready_s": ready_s, **_look(http)}, indent=1))


if __name__ == "__main__":
    main()
