"""The command line of the benchmark, and what docs/benchmarks.md tells people to type."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conserve_sgl import cli
from conserve_sgl.bench.micro import operations
from conserve_sgl.bench.report.results import Result, run_folder, write_run
from conserve_sgl.errors import InputError


def run(*arguments: str):
    return CliRunner().invoke(cli.app, ["bench", *arguments], env={"COLUMNS": "200"})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What `run_bench` was called with."""
    calls: dict = {}

    def run_bench(path: Path, **options: object) -> bool:
        calls.update(options, path=path)
        return options["time_limit_s"] > 1

    monkeypatch.setattr("conserve_sgl.bench.command.run_bench", run_bench)
    return calls


def test_the_commands_of_the_page_are_understood(checkout: Path, asked: dict) -> None:
    page = (checkout / "docs" / "benchmarks.md").read_text()
    commands = re.findall(r"^conserve bench (.+)$", page, re.MULTILINE)
    assert commands
    for command in commands:
        done = run(*shlex.split(command))

        assert done.exit_code == 0, done.output
        assert (checkout / asked["path"]).is_file()


def test_options_and_flags_reach_the_benchmark(asked: dict) -> None:
    done = run(
        *("a.yaml", "--systems", "x,y", "--repeats", "3", "--duration", "5", "--model", "m"),
        *("--trace", "t", "--out", "o", "--fresh", "--time-limit", "9", "--no-pictures"),
        *("--", "--dtype=float32"),
    )

    assert done.exit_code == 0, done.output
    del asked["console"]
    assert asked == {
        "path": Path("a.yaml"),
        "systems": ["x", "y"],
        "repeats": 3,
        "duration_s": 5.0,
        "model": "m",
        "trace": Path("t"),
        "out": Path("o"),
        "fresh": True,
        "time_limit_s": 9.0,
        "pictures": False,
        "flags": ["--dtype=float32"],
    }


def test_runs_that_were_left_out_show_in_the_exit_code(asked: dict) -> None:
    assert run("a.yaml", "--time-limit", "1").exit_code == 3
    assert asked["path"] == Path("a.yaml")


@pytest.mark.parametrize(
    "arguments", [(), ("a.yaml", "--repeat", "2"), ("a.yaml", "--repeats", "0")]
)
def test_a_wrong_command_line_starts_nothing(asked: dict, arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 2
    assert asked == {}


def test_two_folders_are_compared(result: Callable[..., Result], tmp_path: Path) -> None:
    one = result((), load="offline")
    for name in ("a", "b"):
        folder = run_folder(tmp_path / name, "ours", 1)
        folder.mkdir(parents=True)
        write_run(folder, one)

    done = run("--compare", str(tmp_path / "a"), str(tmp_path / "b"))

    assert done.exit_code == 0, done.output
    assert f"A: {tmp_path / 'a'}" in done.output
    assert "| ours | offline total | 0 tok/s | 0 tok/s | - |" in done.output


def test_a_folder_without_results_is_bad_input(tmp_path: Path) -> None:
    done = run("--compare", str(tmp_path), str(tmp_path))
    assert isinstance(done.exception, InputError)


def test_single_operations_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    row = operations.Row("an operation", 16, 1.5, 2.5, 1000)
    monkeypatch.setattr(operations, "MICROS", [lambda: iter([row])])

    done = run("--micro")

    assert done.exit_code == 0, done.output
    assert re.search(r"an operation.*16.*1\.5.*2\.5.*1000", done.output)


def test_the_geometries_are_written(checkout: Path, tmp_path: Path) -> None:
    import json
    import subprocess

    script = checkout / "scripts" / "dummy_model.py"
    for name, layers in (("llama-3.1-8b", 32), ("qwen2.5-7b", 28)):
        folder = tmp_path / name
        subprocess.run([sys.executable, str(script), name, str(folder)], check=True)

        config = json.loads((folder / "config.json").read_text())
        assert config["num_hidden_layers"] == layers
        assert config["hidden_size"] % config["num_attention_heads"] == 0
