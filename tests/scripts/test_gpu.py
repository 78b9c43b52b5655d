"""What scripts/gpu/run.sh runs, with a Python that writes down what it is asked for."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from conserve_sgl.bench.gpu.__main__ import main
from conserve_sgl.bench.gpu.parts import PARTS
from conserve_sgl.bench.systems.config import load_bench
from conserve_sgl.cli import app

RECORDER = """#!/bin/sh
for word in "$@"; do printf '%s\\t' "$word" >>"$RECORD"; done
echo >>"$RECORD"
case "$*" in *"$FAILS"*) exit 3 ;; esac
"""
COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands}
ALL = [part.name for part in PARTS]


@pytest.fixture
def run(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """Runs what the script does; gives its result and the commands that it would have run."""
    python, record = tmp_path / "python", tmp_path / "record"
    python.write_text(RECORDER)
    python.chmod(0o755)
    monkeypatch.chdir(checkout)
    for name, value in (("PYTHON", python), ("RECORD", record), ("OUT", tmp_path / "out")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("CONSERVE_GPU_FLAGS", "--sampling-backend=pytorch")

    def run_main(*argv: str, fails: str = "nothing fails"):
        record.write_text("")
        monkeypatch.setenv("FAILS", fails)
        status = main(["--results", f"{tmp_path}/res", *argv])
        done = subprocess.CompletedProcess(argv, status, *capfd.readouterr())
        return done, [line.split("\t")[:-1] for line in record.read_text().splitlines()]

    return run_main


def test_the_script_lists_the_parts_in_the_order_of_worth(checkout, tmp_path):
    script = checkout / "scripts" / "gpu" / "run.sh"
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([script, "--list"], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ALL, done.stderr


def test_a_plan_runs_nothing(run, tmp_path):
    done, commands = run("--plan", "--minutes", "8")
    assert [line.split()[2] for line in done.stdout.splitlines()] == ALL[:3]
    assert commands == []
    assert not (tmp_path / "res").exists()


def test_a_part_that_is_not_there_is_refused_before_anything_runs(run):
    done, commands = run("check", "bemch")
    assert done.returncode == 64
    assert "no part is called bemch" in done.stderr
    assert commands == []


def test_archives_that_are_not_there_are_refused_before_anything_runs(run, tmp_path):
    done, commands = run("--from", str(tmp_path))
    assert done.returncode == 64
    assert "holds no *.tar.xz" in done.stderr
    assert commands == []


@pytest.mark.parametrize("options", [(), ("--rehearse",)], ids=["run", "rehearsal"])
def test_every_command_is_one_that_exists(
    run, checkout, shared_data, monkeypatch, tmp_path, options
):
    monkeypatch.setenv("CONSERVE_BENCH_DATA", str(shared_data))
    monkeypatch.setenv("CONSERVE_FLASHINFER", "/some/folder")
    run("check")
    (tmp_path / "res" / "machine" / "backend.json").write_text('{"use": "fa3"}')
    done, commands = run(*options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(commands) > 20
    for command in commands:
        if command[0] != "-m":
            assert (checkout / command[0]).is_file()
            continue
        assert importlib.util.find_spec(command[1]), command
        if command[1] == "conserve_sgl.cli":
            assert command[2] in COMMANDS
        if command[2] == "bench":
            systems = command[command.index("--systems") + 1].split(",")
            assert load_bench(checkout / command[3]).only(systems)
    tests = next(command for command in commands if "pytest" in command)
    assert all((checkout / word).is_file() for word in tests if word.endswith(".py"))
    for part in ALL[1:]:
        assert f"== {part}: done" in done.stdout


class Reached(Exception):
    pass


def _reached(*_args: object, **_kwargs: object) -> None:
    raise Reached


def test_every_measurement_understands_what_it_is_asked(run, monkeypatch):
    """Options that a module does not know would show on the GPU only."""
    _, commands = run()
    modules = [c for c in commands if c[1].startswith("conserve_sgl.bench.")]
    assert len(modules) == 6
    for _, name, *argv in modules:
        module = importlib.import_module(name)
        # Either is the first thing that it does once it has read its options.
        for does in {"serving", "write_model"} & set(vars(module)):
            monkeypatch.setattr(module, does, _reached)
        with pytest.raises(Reached):
            module.main(argv)


def test_flags_and_backend_reach_every_server(run):
    _, commands = run("--backend", "fa3", "stock", "yields", "triton", "overlap")
    servers = [c for c in commands if "--" in c]
    assert len(servers) == 4
    assert all("--sampling-backend=pytorch" in c[c.index("--") :] for c in servers)
    chosen = [[word for word in c if "--attention-backend" in word] for c in servers]
    assert chosen == [["--attention-backend=fa3"]] * 2 + [["--attention-backend=triton"]] + [
        ["--attention-backend=fa3"]
    ]


def test_a_backend_that_is_chosen_is_not_checked(run):
    done, commands = run("--backend", "fa3", "check")
    assert commands == []
    assert "check is left out: the backend was chosen by hand" in done.stdout
    _, commands = run("yields")  # goes on with it
    assert "--attention-backend=fa3" in commands[-1]


def test_triton_has_no_second_row_where_it_is_the_first(run):
    done, commands = run("--backend", "triton", "triton")
    assert commands == []
    assert "triton is left out: the main rows are Triton's" in done.stdout


def test_a_part_that_fails_leaves_the_others(run, tmp_path):
    done, commands = run("resume", "overlap", fails="conserve_sgl.bench.micro.resume")
    assert done.returncode == 0, done.stdout  # status 3 says that time ran out
    assert "== resume: out of time" in done.stdout
    assert "== overlap: done" in done.stdout
    assert [c[1] for c in commands if c[0] == "-m"][-1] == "conserve_sgl.bench.micro.overlap"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"machine.tar.xz", "summary.md"}


def test_a_second_run_on_a_fresh_machine_does_what_is_missing(run, tmp_path):
    run("check", "yields")
    (tmp_path / "out").rename(tmp_path / "earlier")
    for path in sorted((tmp_path / "res").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()

    done, _ = run("--from", str(tmp_path / "earlier"), "--minutes", "500")

    begun = re.findall(r"== (\w+), at most", done.stdout)
    assert begun == [
        part for part in ALL if part not in ("check", "yields", "triton", "flashinfer")
    ]


def test_geometries_are_written_where_they_are_asked_for(run):
    _, commands = run("--rehearse", "qwen")
    assert json.dumps(commands).count("scripts/dummy_model.py") == 1


def test_install_unpacks_the_kit_and_says_where_everything_is(checkout, tmp_path):
    carried, site, record = tmp_path / "kit", tmp_path / "site", tmp_path / "record"
    (carried / "ours").mkdir(parents=True)
    (carried / "ours" / "conserve_sgl-0.1.0-py3-none-any.whl").touch()
    (carried / "commit").write_text("abc123\n")
    kit = tmp_path / "install.sh"
    kit.write_text('mkdir -p "$2/lib-flashinfer" && echo "export PYTHONPATH=$2/lib" >"$2/env.sh"\n')
    with tarfile.open(carried / "piece-00.tar", "w") as piece:
        piece.add(kit, "install.sh")
    python = tmp_path / "python"
    python.write_text(RECORDER)
    python.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "PYTHON": str(python), "RECORD": str(record)}
    env["FAILS"] = "nothing fails"
    script = checkout / "scripts" / "gpu" / "install.sh"
    subprocess.run([script, carried, site], env=env, check=True, timeout=60)

    shown = subprocess.run(
        ["bash", "-c", f"source {site}/env.sh && env"], env=env, capture_output=True, text=True
    ).stdout
    said = dict(line.split("=", 1) for line in shown.splitlines() if "=" in line)
    assert said["PYTHONPATH"] == f"{site}/ours:{site}/sglang/lib"
    assert said["CONSERVE_COMMIT"] == "abc123"
    assert said["CONSERVE_BENCH_DATA"] == f"{carried}/data"
    assert said["TRITON_CACHE_DIR"] == f"{said['CONSERVE_KERNEL_CACHE']}/triton"
    assert said["CONSERVE_FLASHINFER"] == f"{site}/sglang/lib-flashinfer"
    assert "--no-index" in record.read_text().split("\t")
