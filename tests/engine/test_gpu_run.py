"""The run on a GPU, rehearsed on a CPU: real servers, from the command line to the archives."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from conserve_sgl.bench.gpu.page import page
from conserve_sgl.bench.report.results import by_system, read_folder
from conserve_sgl.profile.steps import read_steps

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(1000),
    pytest.mark.usefixtures("no_other_server"),
]

SYSTEMS = {"online-only", "offline-only", "conserve", "conserve-50ms"}
LIMIT_S = 900  # two servers, on a machine that may be busy


@pytest.fixture(scope="module")
def rehearsed(checkout: Path, shared_data: Path, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a rehearsal, and what it said."""
    folder = tmp_path_factory.mktemp("gpu")
    env = {**os.environ, "PYTHON": sys.executable, "OUT": str(folder / "out")}
    env["CONSERVE_BENCH_DATA"] = str(shared_data)
    script = checkout / "scripts" / "gpu" / "run.sh"
    options = ["--rehearse", "--minutes", f"{LIMIT_S / 60 - 1}", "--results", folder / "res"]
    argv = [script, *options, "stock", "conserve"]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_every_system_is_measured_on_two_servers_and_leaves_its_steps(rehearsed):
    folder, said = rehearsed
    assert "== stock: done" in said
    systems = {s.name: s.results[0] for s in by_system(read_folder(folder / "res/llama8b-default"))}
    assert set(systems) == SYSTEMS
    for name in SYSTEMS:
        assert read_steps(folder / f"res/llama8b-default/runs/{name}.1/steps.jsonl")
    assert len({tuple(r.run.server_command) for r in systems.values()}) == 2
    assert systems["conserve-50ms"].run.slo.tpot_ms == 50


def test_all_of_it_leaves_in_archives_and_becomes_a_page(rehearsed):
    folder, said = rehearsed
    packed = {path.name for path in (folder / "out").iterdir()}
    assert packed == {"llama8b-default.tar.xz", "machine.tar.xz", "summary.md"}
    with tarfile.open(folder / "out" / "machine.tar.xz") as tar:
        names = tar.getnames()
    assert "machine/environment.json" in names
    assert any(name.startswith("machine/profiles/") for name in names)
    assert said.rstrip().endswith((folder / "out" / "summary.md").read_text().rstrip())
    assert "| conserve-50ms |" in page(folder / "res")
