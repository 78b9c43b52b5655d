"""`conserve eval` against a real server: the main job, on real questions."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from string import Template

import pytest

pytestmark = pytest.mark.engine

LINES = 24
JOB = Template(
    """
endpoints: [$url]
output: $output
max_in_flight: 8
tasks:
  - name: gsm8k
    data: $data/gsm8k_test.jsonl
    limit: $lines
    prompt: "Question: {{ question }}\\nAnswer:"
    sampling: {max_new_tokens: 24}
    score:
      kind: exact_match
      pattern: '(-?\\d+)'
      target: "{{ answer.split('#### ')[1] }}"
  - name: arc_easy
    data: $data/arc_easy_test.jsonl
    limit: $lines
    prompt: "Question: {{ centerpiece }}\\nAnswer:"
    score: {kind: loglikelihood_choice, choices: options, target: "correct_options_idx[0]"}
"""
)


@pytest.fixture(scope="module")
def server(start_server, checkout: Path) -> Iterator:
    model = checkout / ".cache" / "models" / "SmolLM2-135M-Instruct-float32"
    with start_server(model, config="") as server:
        yield server


@pytest.fixture
def job(server, shared_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    output = tmp_path / "results"
    values = {"url": server.base_url, "output": output, "data": shared_data, "lines": LINES}
    path.write_text(JOB.substitute(values))
    return path


def _eval(job: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "conserve_sgl.cli", "eval", str(job)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def _ids(job: Path, task: str) -> list[str]:
    path = job.parent / "results" / f"{task}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["id"] for line in lines]


def test_the_job_runs_as_offline_work(server, job):
    before = server.offline_accepted()
    process = _eval(job)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for task in ("gsm8k", "arc_easy"):
        assert sorted(_ids(job, task)) == sorted(set(_ids(job, task)))
        assert len(_ids(job, task)) == LINES
    summary = json.loads((job.parent / "results" / "summary.json").read_text())
    scores = {name: task["score"] for name, task in summary["tasks"].items()}
    # Chance is .25.
    assert scores["arc_easy"] > 0.3
    assert server.offline_accepted() >= before + 2 * LINES
    server.assert_idle_and_balanced()


def test_it_goes_on_after_being_killed(server, job):
    process = _eval(job)
    while len(_ids(job, "gsm8k")) < 5:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done_before = _ids(job, "gsm8k")

    process = _eval(job)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert _ids(job, "gsm8k")[: len(done_before)] == done_before
    assert sorted(map(int, _ids(job, "gsm8k"))) == list(range(1, LINES + 1))
    server.assert_idle_and_balanced()
