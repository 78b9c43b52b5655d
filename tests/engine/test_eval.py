"""`conserve eval` against a real server: JSONL and lm-eval tasks, on real questions."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from string import Template

import pytest

pytestmark = pytest.mark.engine

LINES = 24  # of each task
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


@pytest.fixture
def server(smollm2_server):
    return smollm2_server


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


LM_EVAL_LINES = 8
LM_EVAL_JOB = Template(
    """
endpoints: [$url]
output: $output
max_in_flight: 8
lm_eval:
  include_path: $tasks
  limit: $lines
  bootstrap_iters: 10
  gen_kwargs: {max_gen_toks: 8}
  tasks:
    - {task: conserve_arc_easy, dataset_kwargs: {data_files: {test: $data/arc_easy_test.jsonl}}}
    - {task: conserve_gsm8k, dataset_kwargs: {data_files: {test: $data/gsm8k_test.jsonl}}}
"""
)


@pytest.fixture
def lm_eval_job(server, checkout: Path, shared_data: Path, tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    values = {"url": server.base_url, "output": tmp_path / "results", "data": shared_data}
    values |= {"tasks": checkout / "configs" / "jobs" / "lm_eval", "lines": LM_EVAL_LINES}
    path = tmp_path / "lm_eval.yaml"
    path.write_text(LM_EVAL_JOB.substitute(values))
    return path


def _score(model: Path, questions: list[dict]) -> list[list[tuple[float, bool]]]:
    """Logprob and greediness of every choice of every question, by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The idle server polls on a core of its own: two threads here would wait for each other.
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    scores = []
    for question in questions:
        prompt = f"Question: {question['centerpiece']}\nAnswer:"
        start = len(tokenizer(prompt).input_ids)
        scores.append([])
        for choice in question["options"]:
            ids = torch.tensor(tokenizer(f"{prompt} {choice}").input_ids)
            with torch.no_grad():
                logprobs = network(ids[None]).logits[0].log_softmax(-1)[start - 1 : -1]
            given = logprobs.gather(1, ids[start:, None]).sum().item()
            scores[-1].append((given, bool((logprobs.argmax(-1) == ids[start:]).all())))
    return scores


def test_lm_eval_agrees_with_transformers_after_being_killed(server, smollm2, lm_eval_job):
    """Killed on the way, run again: every request was sent once, every choice scored right."""
    before = server.offline_accepted()
    output = lm_eval_job.parent / "results"
    process = _eval(lm_eval_job)
    while _cached(output) < 10:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    cached = _cached(output)

    process = _eval(lm_eval_job)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors

    (file,) = output.glob("*/samples_conserve_arc_easy_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    ours = [[resp[0] for resp in sample["resps"]] for sample in samples]
    questions = [sample["doc"] for sample in samples]
    theirs = _score(smollm2, questions)
    assert len(ours) == LM_EVAL_LINES
    for mine, reference in zip(ours, theirs, strict=True):
        assert [float(logprob) for logprob, _ in mine] == pytest.approx(
            [logprob for logprob, _ in reference], abs=1e-2
        )
        assert [greedy for _, greedy in mine] == [str(greedy) for _, greedy in reference]
    right = [
        max(range(len(scores)), key=lambda i: scores[i][0]) == question["correct_options_idx"][0]
        for question, scores in zip(questions, theirs, strict=True)
    ]
    summary = json.loads((output / "summary.json").read_text())["lm_eval"]
    assert summary["tasks"]["conserve_arc_easy"]["acc"]["value"] == sum(right) / LM_EVAL_LINES
    total = sum(len(scores) for scores in ours) + LM_EVAL_LINES
    assert summary["run_requests"] == total - cached
    assert server.offline_accepted() - before >= total
    server.assert_idle_and_balanced()


def _cached(output: Path) -> int:
    """Answers in lm-eval's cache."""
    for path in output.glob("lm_eval_cache_*.db"):
        with closing(sqlite3.connect(path)) as cache:
            found = cache.execute("select 1 from sqlite_master where name = 'unnamed'").fetchall()
            return cache.execute("select count(*) from unnamed").fetchone()[0] if found else 0
    return 0
