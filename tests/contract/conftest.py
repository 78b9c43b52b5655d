"""Imports SGLang once, before the first of these tests; it warns about absent GPU kernels."""

from __future__ import annotations

import asyncio
import warnings

import pytest


@pytest.fixture(scope="session", autouse=True)
def _sglang() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import sglang.srt.entrypoints.http_server
        import sglang.srt.managers.scheduler  # noqa: F401
    # Importing it makes uvloop the loop of this process; its timers count in milliseconds and may
    # end early, which is not for the tests that come after these.
    asyncio.set_event_loop_policy(None)
