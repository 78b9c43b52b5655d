"""A server that would not serve as configured does not start, and says why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conserve_sgl.bench.systems.server import free_port
from conserve_sgl.plugin import HOOK_TARGETS

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("no_other_server")]


def _serve(model: Path, config: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "conserve_sgl.cli", "serve", f"--config={config}", "--"]
    flags = (f"--model-path={model}", f"--port={free_port()}", *flags)
    return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "conserve.yaml"
    path.write_text("slo: {yield_ms: 64.0}\n")
    return path


def test_a_flag_that_conflicts(tiny_llama, config):
    done = _serve(tiny_llama, config, "--pp-size=2")
    assert done.returncode == 1
    assert "refusing to start: --pp-size=2 does not go with conserve" in done.stderr


def test_a_configuration_that_is_wrong(tiny_llama, config):
    config.write_text("slo:\n  yield_ms: 64.0\n  steps: 1\n")
    done = _serve(tiny_llama, config)
    assert done.returncode == 2
    assert f"{config}:3: slo.steps: unknown key" in done.stderr


def test_the_doctor_finds_a_server_that_would_start(tiny_llama, config):
    command = [sys.executable, "-m", "conserve_sgl.cli", "doctor", f"--config={config}", "--"]
    flags = [f"--model-path={tiny_llama}", f"--port={free_port()}"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    for target in HOOK_TARGETS:
        assert f"ok   hook           {target.removeprefix('sglang.srt.')}\n" in done.stdout
    assert done.stdout.endswith("A server would start, with conserve in every process.\n")
