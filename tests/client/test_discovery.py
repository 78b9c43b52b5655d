"""The workers of a gateway, as its answer says them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest
from aiohttp import web

from client.test_http import Bench, Servers
from conserve_sgl.client.discovery import healthy_workers
from conserve_sgl.client.retry import Retry
from conserve_sgl.errors import JobError


@asynccontextmanager
async def gateway(body: str, status: int = 200) -> AsyncIterator[str]:
    """The URL of a server that answers `GET /workers` so."""

    async def workers(_: web.Request) -> web.Response:
        return web.Response(text=body, status=status)

    app = web.Application()
    app.router.add_get("/workers", workers)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


async def found(url: str) -> list[str]:
    async with aiohttp.ClientSession() as session:
        return await healthy_workers(session, url)


def worker(url: str, *, is_healthy: bool = True) -> dict:
    return {"id": "1", "url": url, "is_healthy": is_healthy, "load": 3, "priority": 50}


async def test_those_that_are_well_and_speak_http_are_found():
    workers = [
        worker("http://a:1"),
        worker("http://b:2", is_healthy=False),
        worker("grpc://c:3"),
        worker("https://d"),
    ]
    async with gateway(json.dumps({"workers": workers, "total": 4})) as url:
        assert await found(f"{url}/") == ["http://a:1", "https://d"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        pytest.param("{}", 404, "404: this is no gateway", id="no such route"),
        pytest.param("{}", 401, "401: .* API key", id="a key is wanted"),
        pytest.param("hello", 200, "no gateway of SGLang", id="not JSON"),
        pytest.param('{"workers": 3}', 200, "no gateway of SGLang", id="another shape"),
        pytest.param('{"workers": []}', 200, "none of its 0 workers", id="none"),
        pytest.param(
            json.dumps({"workers": [worker("http://a", is_healthy=False)]}),
            200,
            "none of its 1 workers is well",
            id="none is well",
        ),
    ],
)
async def test_an_answer_that_names_none_is_an_error_that_says_so(body, status, says):
    async with gateway(body, status) as url:
        with pytest.raises(JobError, match=says):
            await found(url)


async def test_a_gateway_that_is_not_there_is_an_error_that_names_it():
    async with gateway("{}") as url:
        pass
    with pytest.raises(JobError, match=f"{url}/workers"):
        await found(url)


# ----------------------------------------------------------------- a client that discovers


async def test_a_client_sends_to_the_workers_that_its_gateway_names(server):
    async with gateway(json.dumps({"workers": [worker(server.url)]})) as url:
        bench = Bench(target=Servers([], Retry(), discover=url))
        async with bench.client:
            answer, endpoint = await bench.post("x")
        assert (answer, endpoint.url) == ("X", server.url)


async def test_a_client_does_not_begin_where_the_gateway_has_nobody():
    async with gateway('{"workers": []}') as url:
        bench = Bench(target=Servers([], Retry(), discover=url))
        with pytest.raises(JobError, match="none of its 0 workers"):
            async with bench.client:
                pass
