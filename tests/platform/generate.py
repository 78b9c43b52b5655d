"""Run one engine on the CPU platform and print what it generated, as JSON on the last line.

    python generate.py '{"engine": {...}, "rounds": [["prompt", ...], ...], "new_tokens": 8}'

`engine` holds keywords of sglang.Engine; the prompts of a round are sent together. Prints a list of
rounds, each a list of {"tokens": [...], "cached_tokens": n}.
"""

from __future__ import annotations

import json
import sys

import sglang


def main() -> None:
    job = json.loads(sys.argv[1])
    engine = sglang.Engine(log_level="error", random_seed=0, **job["engine"])
    sampling = {"temperature": 0, "max_new_tokens": job["new_tokens"], "ignore_eos": True}
    try:
        rounds = [engine.generate(prompts, sampling) for prompts in job["rounds"]]
    finally:
        engine.shutdown()
    print(json.dumps([[_brief(reply) for reply in replies] for replies in rounds]), flush=True)


def _brief(reply: dict) -> dict:
    return {
        "tokens": reply["output_ids"],
        "cached_tokens": reply["meta_info"]["cached_tokens"],
    }


if __name__ == "__main__":
    main()
