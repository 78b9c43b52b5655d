"""Records with known latencies, and the fake engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from conserve_sgl.bench.client import RequestRecord

FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")


@pytest.fixture(scope="session")
def fake_engine_path() -> Path:
    """The fake engine as a program."""
    return FAKE_ENGINE


@pytest.fixture(scope="session")
def fake_engine() -> ModuleType:
    """The fake engine as a module."""
    spec = importlib.util.spec_from_file_location("fake_engine", FAKE_ENGINE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def record() -> Callable[..., RequestRecord]:
    """Makes a completed record of one-token chunks at `times_s`, or a failed one with `error`."""

    def make(
        sent_s: float = 0.0,
        times_s: tuple[float, ...] = (0.1,),
        *,
        tokens: tuple[int, ...] | None = None,
        error: str | None = None,
    ) -> RequestRecord:
        return RequestRecord(
            class_="online",
            due_s=sent_s,
            sent_s=sent_s,
            done_s=None if error else times_s[-1],
            chunk_times_s=times_s,
            chunk_tokens=tokens or (1,) * len(times_s),
            prompt_tokens=10,
            cached_tokens=2,
            error=error,
        )

    return make
