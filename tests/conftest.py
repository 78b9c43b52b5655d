"""Fixtures that every test folder shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent


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
