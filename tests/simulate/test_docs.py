"""The commands of the pages run as they stand there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from conserve_sgl.cli import app
from conserve_sgl.device.table import load_device, shipped_devices
from conserve_sgl.profile import DIR_ENV
from conserve_sgl.simulate.engine import Host
from device.test_make import SERVED, log_of
from simulate.test_command import KEYS

CHECKOUT = Path(__file__).parent.parent.parent
PAGE = (CHECKOUT / "docs" / "simulate.md").read_text(encoding="utf-8")
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    *re.findall(r"^conserve simulate .*", PAGE, re.MULTILINE),
    *re.findall(r"^conserve simulate .*", README, re.MULTILINE),
]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A folder with a little of the trace: a request in every second of a quarter of an hour."""
    lines = [f"2023-11-16 18:{15 + s // 60:02}:{s % 60:02}.0000000,700,40" for s in range(1200)]
    path = tmp_path / "azure_llm_2023_conv.csv"
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    return tmp_path


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_pages_runs(command, trace, tmp_path, monkeypatch):
    monkeypatch.setenv("CONSERVE_BENCH_DATA", str(trace))
    monkeypatch.chdir(CHECKOUT)
    monkeypatch.setattr("conserve_sgl.simulate.command.write_plots", lambda *_: [])
    mine = tmp_path / "mine.json"
    mine.write_bytes(shipped_devices()["h100-llama8b-fa3"].read_bytes())
    arguments = shlex.split(command.replace("mine.json", str(mine)))[1:]
    short = ["--duration", "2", "--set", "dial=[]", "--set", "offline.in_flight=8"]
    out = tmp_path / "out"
    done = CliRunner().invoke(app, [*arguments, *short, "--systems", "conserve", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "conserve" in (out / "table.md").read_text()


def test_the_command_of_the_page_makes_a_device(profile, tmp_path, monkeypatch):
    (command,) = re.findall(r"^conserve device .*", PAGE, re.MULTILINE)
    (tmp_path / "profiles").mkdir()
    profile.rename(tmp_path / "profiles" / "a.json")
    monkeypatch.setenv(DIR_ENV, str(tmp_path / "profiles"))
    monkeypatch.chdir(tmp_path)
    assert log_of(tmp_path, *SERVED).name in command
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output
    assert load_device(tmp_path / "mine.json").name == "mine"


def test_the_page_lists_every_option_of_the_command():
    shown = CliRunner().invoke(app, ["simulate", "--help"], env={"COLUMNS": "200"}).output
    options = set(re.findall(r"--[a-z]+", shown)) - {"--help"}
    assert options == {
        "--config",
        "--device",
        "--trace",
        "--duration",
        "--systems",
        "--set",
        "--out",
    }
    assert all(f"`{option} " in PAGE for option in options)


def test_the_page_lists_every_key_of_the_figures_device_and_time_of_the_host():
    fields = [field.name for field in msgspec.structs.fields(Host)]
    for name in (*KEYS, *shipped_devices(), *fields):
        assert f"`{name}`" in PAGE
