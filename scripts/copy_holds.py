"""What copies to the host cost: how late decode steps are that follow the result of a prefill.

    python scripts/copy_holds.py STEPS.jsonl ... [--least TOKENS]

With HiCache, SGLang copies what entered the radix tree to host memory once the result of a prefill
is in. With overlap scheduling that is while the next step runs, before the one after it is
launched. So those decode steps are looked at that are the second after a step of `--least` prompt
tokens or more, with a decode step between: how much longer each took than its rows say, by a
latency model of the decode steps that follow decode steps alone.

Prints the microseconds for each prompt token. `copy_holds_s` of the shipped devices is its median.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from conserve_sgl.errors import InputError
from conserve_sgl.policy.latency import LatencyModel, StepKind, StepSample
from conserve_sgl.profile.steps import read_steps


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--least", type=int, default=800)
    given = parser.parse_args(argv)
    try:
        held_us = np.concatenate([held_of(log, given.least) for log in given.logs])
    except InputError as e:
        parser.error(str(e))
    if not len(held_us):
        parser.error(f"no decode step is the second after a prefill of {given.least} tokens")
    p10, p50, p90 = np.percentile(held_us, (10, 50, 90))
    print(f"{len(held_us)} steps: {p50:.1f} us a token (P10 {p10:.1f}, P90 {p90:.1f})")


def held_of(log: Path, least: int) -> np.ndarray:
    """Microseconds by which each such step of a log was late, for each prompt token before it.

    Raises:
        InputError: the log cannot be read, or it tells nothing of decode steps alone.
    """
    steps = read_steps(log)
    # A step whose beginning was not known is in the log with 0 seconds.
    threes = [t for t in zip(steps, steps[1:], steps[2:], strict=False) if t[2].seconds > 0]
    alone = [c for *before, c in threes if _decode(*before, c)]
    if not alone:
        raise InputError(log, "there are no three decode steps in a row to compare with")
    model = LatencyModel(alone, layers=1)
    return np.array(
        [
            1e6 * (c.seconds - model.predict_s(c.work)) / a.work.prefill_tokens
            for a, b, c in threes
            if a.work.prefill_tokens >= least and _decode(b, c)
        ]
    )


def _decode(*steps: StepSample) -> bool:
    return all(step.work.kind is StepKind.DECODE for step in steps)


if __name__ == "__main__":
    main()
