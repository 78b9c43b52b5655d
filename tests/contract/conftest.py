"""Imports SGLang once, before the first of these tests; it warns about absent GPU kernels."""

from __future__ import annotations

import warnings

import pytest


@pytest.fixture(scope="session", autouse=True)
def _sglang() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sglang.srt.entrypoints.http_server
        import sglang.srt.managers.scheduler  # noqa: F401
