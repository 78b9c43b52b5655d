"""Whether an attention backend answers as another one does: the same prompts on both.

    python -m conserve_sgl.bench.micro.backends --out DIR [--candidate fa3] [-- SGLANG FLAGS]

Weights that SGLang makes up are so small that any attention would pass with them. Those of this
small model (8 layers, heads of 128, bf16) are drawn so wide that an answer depends on its whole
prompt. Two servers answer 64 prompts each, half of them over prefixes of the others. As long as
both choose the same tokens their logprobs must agree; where they first differ it must be a tie for
both. Prints one JSON object; `use` is the candidate if it answers right, else the reference.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import msgspec

from conserve_sgl.bench.systems.server import ServerProcess, free_port, split_flags
from conserve_sgl.config import CONFIG_ENV
from conserve_sgl.errors import ServerError

__all__ = ["Answer", "Comparison", "compare", "main", "prompts", "write_model"]

AGREE_NATS = 0.75
"""Logprobs that differ by more are another answer. Rounding to bf16 moves those of this model by
0.04 in the median and 0.3 at most (against float32, over 1,200 places, on a CPU); an attention that
is wrong, by whole nats."""

_VOCABULARY, _HEAD = 2048, 128
_PROMPTS, _OUTPUT_TOKENS, _LONGEST = 64, 16, 900
_TOP = 5
_POOL_TOKENS = 90_000
_SPREAD = 1.6
_HTTP_S = 120.0
_FLAGS = (
    *("--skip-tokenizer-init", "--mem-fraction-static=0.3", f"--max-total-tokens={_POOL_TOKENS}"),
    *("--chunked-prefill-size=2048", "--max-running-requests=128"),
)


class Answer(msgspec.Struct, frozen=True):
    """What one backend answered to one prompt.

    Args:
        tokens: chosen, greedily.
        logprobs: of each.
        top: at each place the likeliest tokens and their logprobs.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top: tuple[dict[int, float], ...]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """How the candidate's answers differ from the reference's.

    Args:
        prompts: that were answered by both.
        same: of them, with the same tokens throughout.
        compared_tokens: up to the first difference of each prompt.
        logprob_difference: of those tokens, median and greatest, in nats.
        widest_tie: at a first difference, how far apart the two tokens are for the backend that
            sees them further apart; infinite when one is not even among the likeliest.
    """

    prompts: int
    same: int
    compared_tokens: int
    logprob_difference: tuple[float, float]
    widest_tie: float

    @property
    def agrees(self) -> bool:
        """Whether all that differs is rounding."""
        return (
            self.prompts > 0
            and self.compared_tokens >= 4 * self.prompts
            and max(self.logprob_difference[1], self.widest_tie) <= AGREE_NATS
        )


def compare(reference: Sequence[Answer], candidate: Sequence[Answer]) -> Comparison:
    """Answers to the same prompts, in the same order."""
    differences, ties, same = [0.0], [0.0], 0
    compared = 0
    for one, other in zip(reference, candidate, strict=True):
        at = _first_difference(one.tokens, other.tokens)
        same += at == len(one.tokens) == len(other.tokens)
        compared += at
        differences += [
            abs(a - b) for a, b in zip(one.logprobs[:at], other.logprobs[:at], strict=True)
        ]
        if at < min(len(one.tokens), len(other.tokens)):
            ties.append(max(_apart(one, at, other.tokens[at]), _apart(other, at, one.tokens[at])))
    return Comparison(
        prompts=len(reference),
        same=same,
        compared_tokens=compared,
        logprob_difference=(statistics.median(differences), max(differences)),
        widest_tie=max(ties),
    )


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _apart(answer: Answer, at: int, token: int) -> float:
    return answer.logprobs[at] - answer.top[at].get(token, float("-inf"))


def prompts(count: int = _PROMPTS, longest: int = _LONGEST) -> list[list[int]]:
    """Token ids of `count` prompts; every second one begins as the one before it."""
    chance = random.Random(0)
    made: list[list[int]] = []
    for n in range(count):
        own = [chance.randrange(_VOCABULARY) for _ in range(chance.randint(8, longest))]
        made.append(made[-1][: len(made[-1]) // 2] + own[:40] if n % 2 else own)
    return made


def write_model(folder: Path, *, layers: int, hidden: int) -> Path:
    """Write a random Llama with `hidden` / 128 query heads, a quarter as many for KV, in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = hidden // _HEAD
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 4, 1),
        head_dim=_HEAD,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=_SPREAD / weight.shape[1] ** 0.5, generator=generator)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def ask(base_url: str, of: Sequence[Sequence[int]]) -> list[Answer]:
    """Answers of the server at `base_url`: every second prompt first, then the others."""

    def one(ids: Sequence[int]) -> Answer:
        body = {
            "input_ids": list(ids),
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": _OUTPUT_TOKENS,
                "ignore_eos": True,
            },
            "return_logprob": True,
            "top_logprobs_num": _TOP,
        }
        answer = http.post("/generate", json=body).raise_for_status().json()
        meta = answer["meta_info"]
        return Answer(
            tokens=tuple(answer["output_ids"]),
            logprobs=tuple(logprob for logprob, *_ in meta["output_token_logprobs"]),
            top=tuple(
                {token: logprob for logprob, token, *_ in place}
                for place in meta["output_top_logprobs"]
            ),
        )

    with (
        httpx.Client(base_url=base_url, timeout=_HTTP_S) as http,
        ThreadPoolExecutor(len(of)) as pool,
    ):
        first = list(pool.map(one, of[::2]))
        second = list(pool.map(one, of[1::2]))
    answers = [*first, *second]
    answers[::2], answers[1::2] = first, second
    return answers


def _answers(
    model: Path, backend: str, flags: Sequence[str], given: argparse.Namespace
) -> tuple[float, list[Answer]]:
    """Seconds until a server with `backend` was ready, and its answers."""
    started_s = time.monotonic()
    on = [] if backend == "default" else [f"--attention-backend={backend}"]
    log = given.out / f"backend-{backend}.log"
    port = free_port()
    argv = [
        *(sys.executable, "-c", "from sglang.cli.main import main; main()", "serve"),
        *("--model-path", str(model), "--port", str(port), *_FLAGS, *flags, *on),
    ]
    # Stock: a latency profile would only take time.
    with ServerProcess(argv, port=port, log_path=log, env={CONFIG_ENV: ""}) as server:
        server.wait_healthy(given.ready_s)
        took_s = time.monotonic() - started_s
        return took_s, ask(server.base_url, prompts(given.prompts))


def _try(
    backends: Sequence[str], model: Path, flags: Sequence[str], given: argparse.Namespace
) -> tuple[dict[str, tuple[float, list[Answer]]], dict[str, str]]:
    """Of each backend its answers, or why there are none; all at a time."""
    found, faults = {}, {}
    with ThreadPoolExecutor(len(backends)) as pool:
        futures = {b: pool.submit(_answers, model, b, flags, given) for b in backends}
        for backend, future in futures.items():
            try:
                found[backend] = future.result()
            except (ServerError, httpx.HTTPError) as e:
                faults[backend] = str(e)
    return found, faults


def _report(
    reference: str, candidate: str, found: Mapping[str, tuple], faults: Mapping[str, str]
) -> dict:
    comparison = None
    if not faults:
        comparison = compare(found[reference][1], found[candidate][1])
    right = comparison is not None and comparison.agrees
    right |= reference in faults and candidate in found  # nothing to compare with, and no choice
    return {
        "use": candidate if right else reference,
        "reference": reference,
        "candidate": candidate,
        "ready_s": {backend: round(ready_s, 1) for backend, (ready_s, _) in found.items()},
        "comparison": comparison and msgspec.structs.asdict(comparison),
        "faults": dict(faults),
    }


def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(description="Whether two attention backends answer alike.")
    parser.add_argument("--reference", default="triton")
    parser.add_argument("--candidate", default="fa3")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=_PROMPTS)
    parser.add_argument("--ready-s", type=float, default=75.0, help="a server gets so long")
    parser.add_argument("--out", type=Path, required=True, help="folder for result and logs")
    options, flags = split_flags(argv)
    given = parser.parse_args(options)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        model = write_model(folder, layers=given.layers, hidden=given.hidden)
        backends = list(dict.fromkeys([given.reference, given.candidate]))
        found, faults = _try(backends, model, flags, given)
    report = _report(given.reference, given.candidate, found, faults)
    text = msgspec.json.format(msgspec.json.encode(report), indent=1).decode()
    (given.out / "backend.json").write_text(f"{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
