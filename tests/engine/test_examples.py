"""Every file in examples/ does what its first line says, on a real engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def examples(checkout: Path) -> Path:
    return checkout / "examples"


@pytest.fixture
def server(plain_server):
    return plain_server


def run(*command: object, **env: str) -> str:
    """What a command prints to stdout, all else left as the person who types it has it."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.usefixtures("no_other_server")
def test_engine_in_process(examples, tiny_llama, checkout):
    config = checkout / "configs" / "serve" / "default.yaml"
    example = examples / "engine_in_process.py"
    printed = run(example, tiny_llama, CONSERVE_CONFIG=str(config))
    lines = [line for line in printed.splitlines() if line.startswith(("online", "offline"))]
    assert lines[0].startswith("online:  ")
    assert lines[1].startswith("offline: Document 0 is about -> ")
    assert len(lines) == 1 + 8 + 1
    assert lines[-1] == "offline requests accepted: 8"


def test_openai_flex(server, examples):
    before = server.offline_accepted()
    printed = run(examples / "openai_flex.py", CONSERVE_URL=server.base_url)
    assert len(printed.splitlines()) == 4
    assert server.offline_accepted() == before + 4


def test_frontend_program(server, examples):
    before = server.offline_accepted()
    printed = run(examples / "frontend_program.py", CONSERVE_URL=server.base_url)
    assert printed.count("happy (") == 3
    assert server.offline_accepted() >= before + 6  # generating and selecting, three times


def test_eval_job(server, examples, tmp_path):
    before = server.offline_accepted()
    cli = ("-m", "conserve_sgl.cli", "eval", examples / "eval_job" / "job.yaml")
    hub = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    run(*cli, "--endpoint", server.base_url, "--output", tmp_path / "out", **hub)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["partial"] is False
    assert summary["tasks"]["open_capitals"]["finished"] == 5
    assert summary["lm_eval"]["run_requests"] == 15
    assert 0 <= summary["lm_eval"]["tasks"]["capitals"]["acc"]["value"] <= 1
    assert server.offline_accepted() == before + 5 + 15


def test_batch_api(server, examples):
    printed = run(examples / "batch_api.py", CONSERVE_URL=server.base_url)
    assert printed.startswith("completed ")
    assert {"portugal", "peru"} <= set(printed.split())


def test_the_page_lists_every_example(examples):
    page = (examples / "README.md").read_text()
    there = {path.name for path in examples.iterdir()} - {"README.md", "__pycache__"}
    assert {name for name in there if f"`{name}`" in page or f"`{name}/`" in page} == there
