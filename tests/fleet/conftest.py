"""Fleets of workers without an engine, behind SGLang's own gateway."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from fleet.gateway import Gateway
from fleet.worker import Worker


@pytest.fixture
def start_worker() -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def start(**options) -> Worker:
        workers.append(Worker(**options))
        return workers[-1]

    yield start
    for worker in workers:
        worker.stop()


@pytest.fixture
def start_gateway(tmp_path: Path) -> Iterator[Callable[..., Gateway]]:
    gateways: list[Gateway] = []
    numbers = count()

    def start(workers: list[Worker], /, *flags: str, **options) -> Gateway:
        log = tmp_path / f"gateway-{next(numbers)}.log"
        gateways.append(Gateway([w.url for w in workers], *flags, log=log, **options))
        return gateways[-1]

    yield start
    for gateway in gateways:
        gateway.stop()
