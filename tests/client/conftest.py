"""Servers that are not there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.fake_sglang import FakeSGLang


@pytest.fixture
def server() -> Iterator[FakeSGLang]:
    fake = FakeSGLang()
    yield fake
    fake.close()


@pytest.fixture
def second_server() -> Iterator[FakeSGLang]:
    fake = FakeSGLang()
    yield fake
    fake.close()
