"""scripts/gpu/run.sh, with a Python that writes down what it is asked for and runs nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from conserve_sgl.bench.systems import load_bench
from conserve_sgl.cli import app

RECORDER = """#!/bin/sh
for word in "$@"; do printf '%s\\t' "$word" >>"$RECORD"; done
echo >>"$RECORD"
case "$*" in *"$FAILS"*) exit 3 ;; esac
"""
COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands}


@pytest.fixture
def run(checkout: Path, tmp_path: Path):
    """Runs the script; gives its result and the commands that it would have run."""
    python, record = tmp_path / "python", tmp_path / "record"
    python.write_text(RECORDER)
    python.chmod(0o755)

    def run_script(*argv: str, fails: str = "nothing fails"):
        record.write_text("")
        env = {**os.environ, "PYTHON": str(python), "RECORD": str(record), "FAILS": fails}
        env |= {"OUT": str(tmp_path / "out"), "CONSERVE_GPU_FLAGS": "--attention-backend=triton"}
        done = subprocess.run(
            [str(checkout / "scripts" / "gpu" / "run.sh"), *argv],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done, [line.split("\t")[:-1] for line in record.read_text().splitlines()]

    return run_script


def parts_in(text: str) -> list[str]:
    return re.findall(r"^#     (\w+)  +\S", text, re.MULTILINE)


def test_the_parts_are_those_that_the_script_describes(run, checkout):
    done, _ = run("--list")
    text = (checkout / "scripts" / "gpu" / "run.sh").read_text()
    assert done.stdout.split() == parts_in(text)


def test_a_part_that_is_not_there_is_refused_before_anything_runs(run):
    done, commands = run("check", "bemch")
    assert done.returncode == 64
    assert "no part is called bemch" in done.stderr
    assert commands == []


def test_every_command_is_one_that_exists(run, checkout, shared_data, monkeypatch):
    monkeypatch.setenv("CONSERVE_BENCH_DATA", str(shared_data))
    done, commands = run("--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(commands) > 12
    for command in commands:
        if command[0] != "-m":
            assert (checkout / command[0]).is_file()
            continue
        assert importlib.util.find_spec(command[1]), command
        if command[1] == "conserve_sgl.cli" and not command[2].startswith("--"):
            assert command[2] in COMMANDS
        if command[2] == "bench":
            systems = command[command.index("--systems") + 1].split(",")
            assert load_bench(checkout / command[3]).only(systems)
    tests = next(command for command in commands if "pytest" in command)
    assert all((checkout / word).is_file() for word in tests if word.endswith(".py"))


def test_flags_reach_every_server(run):
    _, commands = run("--rehearse", "check", "cost", "bench", "overlap")
    servers = [c for c in commands if c[:2] != ["-m", "pytest"] and "--" in c]
    assert len(servers) >= 5
    assert all("--attention-backend=triton" in c[c.index("--") :] for c in servers)


def test_a_part_that_fails_leaves_the_others(run, tmp_path):
    done, commands = run("--rehearse", "cost", "overlap", fails="conserve_sgl.bench.resume")
    assert done.returncode == 1
    assert "== cost: status 1" in done.stdout
    assert "== overlap: status 0" in done.stdout
    modules = [command[1] for command in commands if command[0] == "-m"]
    assert "conserve_sgl.bench.slice_cost" in modules  # the other half of the part that failed
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"cost.log", "overlap.log"}


def test_geometries_are_written_where_they_are_asked_for(run):
    _, commands = run("--rehearse", "qwen")
    assert json.dumps(commands).count("scripts/dummy_model.py") == 1
