"""Real servers for the engine tests; those that several modules use are started once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.server import Server

StartServer = Callable[..., Any]


@pytest.fixture(scope="session")
def smollm2(checkout: Path) -> Path:
    model = checkout / ".cache" / "models" / "SmolLM2-135M-Instruct-float32"
    assert model.is_dir(), "scripts/test.sh makes it: scripts/demo_model.py --dtype float32"
    return model


@pytest.fixture(scope="module")
def smollm2_server(start_server: StartServer, smollm2: Path) -> Iterator[Server]:
    with start_server(smollm2, "--chunked-prefill-size=256", config="") as server:
        yield server
