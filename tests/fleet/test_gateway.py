"""Offline work beside online requests through SGLang's own gateway."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import httpx
import pytest

from fleet.gateway import Gateway

pytestmark = pytest.mark.timeout(120)
NO_BREAKER = ("--disable-circuit-breaker", "--disable-retries")


async def chat(http: httpx.AsyncClient, text: str, **fields: Any) -> httpx.Response:
    body = {"model": "model", "messages": [{"role": "user", "content": text}], **fields}
    return await http.post("/v1/chat/completions", json=body)


async def through(gateway: Gateway, offline: int, online: int) -> tuple[Counter, Counter]:
    """The statuses of so many offline requests at once, and of online ones in turn beside them."""
    async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:
        tasks = [
            asyncio.create_task(chat(http, f"offline {i}", service_tier="flex"))
            for i in range(offline)
        ]
        answers = [await chat(http, f"online {i}") for i in range(online)]
        backlog = await asyncio.gather(*tasks)
    return Counter(a.status_code for a in backlog), Counter(a.status_code for a in answers)


@pytest.mark.parametrize("policy", ["cache_aware", "power_of_two"])
async def test_online_requests_notice_nothing_of_offline_ones_that_are_refused(
    start_worker, start_gateway, policy
):
    workers = [start_worker(take_spare_only=True, row_s=0.2) for _ in range(2)]
    gateway = start_gateway(workers, *NO_BREAKER, policy=policy)
    offline, online = await through(gateway, offline=60, online=40)
    assert online == {200: 40}
    assert offline[200] + offline[429] == 60
    assert offline[429] > 0
    assert sum(w.refused for w in workers) == offline[429]


async def test_with_its_circuit_breaker_the_gateway_takes_refusals_for_faults(
    start_worker, start_gateway
):
    """Why docs/fleet.md asks for --disable-circuit-breaker. Should this fail one day, good."""
    worker = start_worker(take_spare_only=True, rows=1, row_s=0.5)
    gateway = start_gateway([worker], "--disable-retries")
    _, online = await through(gateway, offline=40, online=20)
    assert online[503] > 0
    assert worker.online.total() < 20


async def test_the_class_comes_through_in_the_body_and_not_in_headers(start_worker, start_gateway):
    worker = start_worker()
    gateway = start_gateway([worker])
    async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:
        http.headers["x-sgl-conserve-class"] = "offline"
        await chat(http, "header")
        del http.headers["x-sgl-conserve-class"]
        await chat(http, "body", service_tier="flex")
    assert worker.online == {"header": 1}
    assert worker.offline == {"body": 1}


async def test_it_has_no_other_routes_of_ours(start_worker, start_gateway):
    gateway = start_gateway([start_worker()])
    for path in ("/offline/v1/chat/completions", "/v1/files", "/v1/batches"):
        assert gateway.http.post(path, json={}).status_code == 404
