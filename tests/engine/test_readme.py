"""What the README tells people to type, typed."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from conserve_sgl.cli import app
from conserve_sgl.config import ConserveConfig


def _blocks(readme: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", readme.read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def readme(checkout: Path) -> Path:
    return checkout / "README.md"


@pytest.fixture(scope="module")
def commands(readme: Path) -> list[list[str]]:
    lines = "".join(_blocks(readme, "bash")).splitlines()
    return [shlex.split(line, comments=True) for line in lines]


def test_scripts_and_files_that_are_named_are_there(checkout, readme, commands):
    words = [word for command in commands for word in command]
    words += re.findall(r"`((?:scripts|configs)/[^` ]+)", readme.read_text())
    words += re.findall(r"\]\(((?!http)[^)#]+)", readme.read_text())
    paths = [word.rpartition("=")[2] for word in words if "/" in word and "://" not in word]
    assert len(paths) > 12
    assert [path for path in paths if not (checkout / path).exists()] == []
    assert all(os.access(checkout / p, os.X_OK) for p in paths if p.startswith("scripts/"))


def test_commands_of_ours_exist(commands):
    ours = [command for command in commands if command[0] == "conserve"]
    assert {command[1] for command in ours} == {
        "serve",
        "eval",
        "run-batch",
        "status",
        "doctor",
        "tune",
        "simulate",
    }
    for _, name, *_ in ours:
        assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_the_configuration_shown_is_the_default(readme, tmp_path):
    (shown,) = _blocks(readme, "yaml")
    path = tmp_path / "shown.yaml"
    path.write_text(shown)
    assert ConserveConfig.load(path) == ConserveConfig()
    assert set(yaml.safe_load(shown)) == {"slo", "offline", "memory", "batch"}


@pytest.mark.engine
def test_the_python_example_runs(readme, plain_server):
    (example,) = _blocks(readme, "python")
    before = plain_server.offline_accepted()
    code = example.replace("http://127.0.0.1:30000", plain_server.base_url)
    code = code.replace('"messages"', '"max_tokens": 4, "temperature": 0, "messages"')
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert plain_server.offline_accepted() == before + 1
    online, offline = done.stdout.splitlines()
    assert online.removeprefix("online: ").strip() == offline.removeprefix("offline:").strip()
