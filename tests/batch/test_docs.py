"""docs/batch.md: its example is a batch, and its tables are complete."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import typer.main

from conserve_sgl import cli
from conserve_sgl.batch import validate
from conserve_sgl.batch.schema import Status
from conserve_sgl.batch.validate import Limits, read_plan
from conserve_sgl.config import ConserveConfig


@pytest.fixture(scope="module")
def page(checkout: Path) -> str:
    return (checkout / "docs" / "batch.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_the_example_is_a_batch(page, tmp_path):
    (example,) = blocks(page, "json")
    path = tmp_path / "in.jsonl"
    path.write_text(example)
    assert read_plan(path, "/v1/chat/completions", Limits()).total == 2


def test_the_configurations_are_some(page, tmp_path):
    path = tmp_path / "conserve.yaml"
    for example, discover in zip(
        blocks(page, "yaml"), (None, "http://conserve-gateway"), strict=True
    ):
        path.write_text(example)
        batch = ConserveConfig.load(path).batch
        assert (batch.storage_dir, batch.discover) == ("/var/lib/conserve", discover)


def test_every_status_is_explained(page):
    table = page.split("| `status` |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) >= set(Status.__args__)


def test_every_code_of_a_fault_is_explained(page):
    codes = set(re.findall(r'_Fault\(\s*"(\w+)"', inspect.getsource(validate)))
    assert len(codes) > 6
    assert [code for code in sorted(codes) if f"`{code}`" not in page] == []


def test_every_option_is_explained_with_its_default(page):
    table = page.split("## From outside")[1].split("\n\n")[1]
    rows = {
        match[1]: row for row in table.splitlines() if (match := re.search(r"(--[\w-]+)`", row))
    }
    command = typer.main.get_command(cli.app).commands["run-batch"]
    options = {o: p for p in command.params for o in p.opts if o.startswith("--")}
    assert set(rows) == set(options) - {"--help"}
    for name, row in rows.items():
        if isinstance(default := options[name].default, int):
            assert f"| {default} |" in row
