"""What copies cost, read off a record of steps that was made up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from conserve_sgl.policy.latency import StepSample, StepWork

HELD_S = 5e-6


def steps(prompt_tokens: int) -> list[StepSample]:
    """Decode steps of 10 ms and 0.1 ms a row; after a prefill the second one waits for a copy."""
    made = []
    for i in range(60):
        rows = 1 + i % 8
        work = StepWork(decode_rows=rows, decode_context=50 * rows)
        decode = StepSample(work, 0.01 + 1e-4 * rows)
        made += [decode] * 4
        made.append(StepSample(StepWork.of([(prompt_tokens, 0)]), 0.03))
        made.append(decode)
        made.append(StepSample(work, decode.seconds + HELD_S * prompt_tokens))
    return made


@pytest.fixture
def say(checkout: Path, tmp_path: Path):
    def run(made: list[StepSample], *options: str) -> subprocess.CompletedProcess[str]:
        log = tmp_path / "steps.jsonl"
        log.write_bytes(b"".join(msgspec.json.encode(step) + b"\n" for step in made))
        argv = [sys.executable, checkout / "scripts" / "copy_holds.py", log, *options]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def said(say):
    return lambda prompt_tokens, *options: say(steps(prompt_tokens), *options)


def test_the_time_a_token_by_which_steps_are_late(said):
    assert said(1000).stdout == "60 steps: 5.0 us a token (P10 5.0, P90 5.0)\n"


def test_smaller_prefills_are_looked_at_when_asked_for(said):
    refused = said(100)
    assert refused.returncode == 2
    assert "no decode step is the second after a prefill of 800 tokens" in refused.stderr
    assert said(100, "--least", "50").stdout.startswith("60 steps: 5.0 us a token")


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(steps(1000)[4:6], id="too short"),
        pytest.param(
            steps(1000)[3:6] * 20, id="a prefill between any two decode steps and a third"
        ),
    ],
)
def test_a_log_without_decode_steps_to_compare_with_is_refused_by_its_name(say, made):
    refused = say(made)
    assert refused.returncode == 2
    assert "steps.jsonl: there are no three decode steps in a row" in refused.stderr
    assert "Traceback" not in refused.stderr
