"""Records with known latencies, and the fake engine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import msgspec
import pytest

from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.report.environment import Environment
from conserve_sgl.bench.report.metrics import Slo
from conserve_sgl.bench.report.results import Result, Run
from conserve_sgl.bench.report.system import SystemConfig

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


@pytest.fixture(scope="session")
def result() -> Callable[..., Result]:
    """Makes the result of a run of 10 s with the given requests."""

    def make(
        records: tuple[RequestRecord, ...] = (),
        *,
        name: str = "ours",
        kind: str = "conserve",
        load: str = "both",
        repeat: int = 1,
        **fields: object,
    ) -> Result:
        run = Run(
            system=SystemConfig(name=name, kind=kind, load=load, dial=fields.pop("dial", None)),
            repeat=repeat,
            fingerprint="f",
            model="some/model",
            seed=1,
            slo=Slo(ttft_ms=500, tpot_ms=100),
            started_unix_s=1_700_000_000.0,
            window_s=10.0,
            duration_s=10.0,
            ready_s=3.0,
            idle_share=None,
            counters_before={},
            counters_after={},
            command=["conserve", "bench"],
            server_command=["sglang"],
            server_env={},
            environment=Environment("a cpu", 2, 8.0, (), "Linux", "3.11", {"sglang": "0"}, "c0"),
        )
        return Result(msgspec.structs.replace(run, **fields), tuple(records))

    return make


@pytest.fixture(scope="session")
def offline(record: Callable[..., RequestRecord]) -> Callable[..., RequestRecord]:
    """Makes an offline record: 8 prompt tokens computed by `first_s`, `tokens` got by `end_s`."""

    def make(first_s: float, end_s: float, tokens: int) -> RequestRecord:
        one = record(0.0, (first_s, end_s), tokens=(1, tokens - 1))
        return msgspec.structs.replace(one, class_="offline")

    return make
