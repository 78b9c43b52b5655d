"""Servers that are not there, and job files to run against them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from support.fake_sglang import second_server, server

__all__ = ["second_server", "server"]


@pytest.fixture
def console() -> Console:
    """Not a terminal; `console.file.getvalue()` is what was printed."""
    return Console(file=io.StringIO(), width=120)


class JobFolder:
    """Writes a job and its data under `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.output = path / "out"

    def data(self, rows: list[Any], name: str = "data.jsonl") -> Path:
        file = self.path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    def job(self, **changes: Any) -> Path:
        """A job with one task, `words`, over data.jsonl; a change to None drops the key."""
        task = {"name": "words", "data": "data.jsonl", "prompt": "say {{ word }}"}
        task |= changes.pop("task", {})
        job = {
            "endpoints": ["http://127.0.0.1:9"],
            "output": str(self.output),
            "retry": {"first_delay_s": 0.001, "max_delay_s": 0.01},
            "tasks": [task],
        }
        job |= changes
        return self.yaml(yaml.safe_dump({k: v for k, v in job.items() if v is not None}))

    def yaml(self, text: str) -> Path:
        file = self.path / "job.yaml"
        file.write_text(text)
        return file

    def records(self, task: str = "words") -> list[dict[str, Any]]:
        return self._lines(f"{task}.jsonl")

    def failures(self, task: str = "words") -> list[dict[str, Any]]:
        return self._lines(f"{task}.errors.jsonl")

    def _lines(self, name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.output / name).read_text().splitlines()]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.output / "summary.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    return JobFolder(tmp_path)


def word_rows(n: int) -> list[dict[str, str]]:
    """n lines whose prompts are all different."""
    return [{"word": f"w{i}"} for i in range(1, n + 1)]


@pytest.fixture
def words() -> Callable[[int], list[dict[str, str]]]:
    return word_rows
