"""Fixtures that every test folder shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

# Engine tests that were written and not yet seen passing as a whole on a quiet machine; see
# docs/limits.md. CONSERVE_TEST_UNSEEN=1 runs them. Whoever sees one pass takes it off this list.
UNSEEN: tuple[str, ...] = (
    "tests/bench/test_engine.py",
    "tests/engine/test_batch.py",
    "tests/engine/test_checkpoint.py",
    "tests/engine/test_coserving.py",
    "tests/engine/test_eval.py",
    "tests/engine/test_examples.py",
    "tests/engine/test_jobs_and_metrics.py",
    "tests/engine/test_profiling.py",
    "tests/engine/test_slices.py",
    "tests/engine/test_stock.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the engine tests of UNSEEN."""
    if os.environ.get("CONSERVE_TEST_UNSEEN") == "1":
        return
    skip = pytest.mark.skip(reason="not yet seen passing on an engine (tests/conftest.py)")
    for item in items:
        if "engine" in item.keywords and item.nodeid.startswith(UNSEEN):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the checkout."""
    return CHECKOUT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real traces and eval sets beside the checkout (CONSERVE_TEST_DATA says where else)."""
    path = Path(os.environ.get("CONSERVE_TEST_DATA", CHECKOUT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}: set CONSERVE_TEST_DATA")
    return path
