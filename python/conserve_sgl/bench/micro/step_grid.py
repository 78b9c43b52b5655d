"""Measures a dense grid of an engine's steps, and keeps what it answers to fixed prompts.

    python -m conserve_sgl.bench.micro.step_grid --model DIR --out DIR [--against DIR] [-- FLAGS]

Starts one server. The folder gets `grid.jsonl` (a step log of the grid), `profile.json` (the
latency profile of the start), `answers.json` (greedy tokens, and how far the two likeliest ones
were apart at each), `server.log` and `server_info.json`. With `--against` the answers are compared
with those of an earlier folder, say of another attention backend: it counts prompts that differ
although the two likeliest tokens were not close to a tie where they first do. The exit status is 1
if any did.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec

from conserve_sgl.bench.systems.server import serving, split_flags
from conserve_sgl.profile import DIR_ENV, ProfileStore
from conserve_sgl.profile.steps import GRID_ENV

__all__ = ["Answer", "compared", "main"]

_TOKEN_IDS = range(100, 30_000)
_PROMPTS, _PROMPT_TOKENS, _OUTPUT_TOKENS = 64, 200, 24
_HTTP_S = 300.0
_TIE = 0.1
"""Difference of log-probabilities below which rounding may decide: bf16 keeps eight bits."""


class Answer(msgspec.Struct, frozen=True):
    """The greedy answer to one prompt.

    Args:
        tokens: their ids.
        margins: log-probability of each less that of the second likeliest.
    """

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


class Compared(msgspec.Struct, frozen=True):
    """Answers of two engines.

    Args:
        prompts: how many there were.
        same: equal to the last token.
        ties: first differ where the two likeliest tokens were close.
        differ: first differ elsewhere.
    """

    prompts: int
    same: int
    ties: int
    differ: int


def compared(ours: list[Answer], theirs: list[Answer]) -> Compared:
    """Compare answers to the same prompts, in the same order."""
    same = ties = 0
    for one, other in zip(ours, theirs, strict=True):
        at = next((i for i, (a, b) in enumerate(zip(one.tokens, other.tokens)) if a != b), None)  # noqa: B905
        if at is None:
            same += 1
        elif min(one.margins[at], other.margins[at]) < _TIE:
            ties += 1
    return Compared(len(ours), same, ties, len(ours) - same - ties)


def _answers(http: httpx.Client) -> list[Answer]:
    chance = random.Random(0)
    prompts = [chance.choices(_TOKEN_IDS, k=_PROMPT_TOKENS) for _ in range(_PROMPTS)]

    def answer(prompt: list[int]) -> Answer:
        sampling = {"temperature": 0, "max_new_tokens": _OUTPUT_TOKENS, "ignore_eos": True}
        body = {
            "input_ids": prompt,
            "sampling_params": sampling,
            "return_logprob": True,
            "top_logprobs_num": 2,
        }
        said = http.post("/generate", json=body).raise_for_status().json()
        tops = said["meta_info"]["output_top_logprobs"]
        return Answer(tuple(said["output_ids"]), tuple(top[0][0] - top[1][0] for top in tops))

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(answer, prompts))


def main(argv: list[str] | None = None) -> int:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(description="A dense grid of an engine's step times.")
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--against", type=Path)
    options, flags = split_flags(argv)
    args = parser.parse_args(options)
    args.out.mkdir(parents=True, exist_ok=True)
    grid = args.out / "grid.jsonl"
    grid.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profiles:
        env = {GRID_ENV: str(grid), DIR_ENV: profiles}
        with (
            serving(args.model, "{}", flags, env, log_path=args.out / "server.log") as server,
            httpx.Client(base_url=server.base_url, timeout=_HTTP_S) as http,
        ):
            answers = _answers(http)
            info = http.get("/server_info").raise_for_status().json()
        (profile,) = ProfileStore(Path(profiles)).paths()
        shutil.copy(profile, args.out / "profile.json")
    (args.out / "server_info.json").write_text(json.dumps(info, indent=1))
    (args.out / "answers.json").write_bytes(msgspec.json.encode(answers))
    print(f"{sum(1 for _ in grid.open())} steps: {grid}")
    if args.against is None:
        return 0
    text = (args.against / "answers.json").read_bytes()
    found = compared(answers, msgspec.json.decode(text, type=list[Answer]))
    print(msgspec.json.encode(found).decode())
    return int(found.differ > 0)


if __name__ == "__main__":
    raise SystemExit(main())
