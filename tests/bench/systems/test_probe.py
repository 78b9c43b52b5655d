from __future__ import annotations

from types import ModuleType

import pytest
from aiohttp.test_utils import TestServer as AppServer

from conserve_sgl.bench.systems.probe import (
    Reading,
    busy_share,
    idle_share,
    parse_metrics,
    read_server,
)


async def test_a_server_is_read_by_its_own_routes(fake_engine: ModuleType) -> None:
    async with AppServer(fake_engine.FakeEngine().app()) as server:
        reading = await read_server(f"http://{server.host}:{server.port}")

    assert reading.idle_s > 0
    assert reading.counters == {
        "retracted_requests": 3,
        "offline_preempted": 0,
        "arrivals_received": 4,
        "arrival_ms.p50": 1.5,
        "arrival_ms.p99": 2.5,
    }


def test_ranks_are_averaged_and_labels_may_hold_anything() -> None:
    text = '# TYPE a counter\na{x="1} 2",y=""} 3.0\na{x="2"} 5\nb 1e-3\nb_created 7\n'
    assert parse_metrics(text) == {"a": 4.0, "b": 0.001, "b_created": 7.0}


@pytest.mark.parametrize(("idle_s", "share"), [(0.0, 0.0), (5.0, 0.5), (10.4, 1.0), (None, None)])
def test_the_idle_share_is_over_the_time_between_two_readings(
    idle_s: float | None, share: float | None
) -> None:
    before = Reading(100.0, 0.0 if idle_s is not None else None, {})
    assert idle_share(before, Reading(110.0, idle_s, {})) == share


@pytest.mark.parametrize(("busy_s", "share"), [(0.0, 0.0), (7.5, 0.75), (None, None)])
def test_the_busy_share_is_an_emulated_device_s_alone(
    busy_s: float | None, share: float | None
) -> None:
    before = Reading(100.0, None, {}, 0.0 if busy_s is not None else None)
    assert busy_share(before, Reading(110.0, None, {}, busy_s)) == share
