"""Batches inside SGLang's own application, without an engine behind it."""

from __future__ import annotations

import asyncio
import inspect
import json
from contextlib import asynccontextmanager

import httpx
import pytest

from conserve_sgl.batch.schema import ENDPOINTS
from conserve_sgl.batch.server.batch_server import BatchServer
from conserve_sgl.config import BatchConfig, ConserveConfig
from conserve_sgl.ingress.hooks import Ingress
from conserve_sgl.ingress.middleware import asked_class

pytestmark = pytest.mark.filterwarnings("ignore:ORJSONResponse is deprecated")

CHAT = "/v1/chat/completions"
LINE = {"custom_id": "a", "method": "POST", "url": CHAT}
LINE["body"] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


class Handler:
    """In the place of SGLang's own; answers with what it sees."""

    async def handle_request(self, _parsed, raw_request):
        return {
            "class": asked_class.get().value,
            "gone": await raw_request.is_disconnected(),
            "job": raw_request.headers["x-sgl-conserve-job"],
        }


@pytest.fixture
def app():
    from sglang.srt.entrypoints import http_server

    return http_server.app


@pytest.fixture
async def client(app, monkeypatch, tmp_path):
    """A client of SGLang's application, with our layers and a key, put together as at a start."""

    from sglang.srt.utils.auth import add_api_key_middleware

    @asynccontextmanager
    async def no_engine(_):
        yield

    for owner, name, value in (
        (app.router, "routes", list(app.router.routes)),
        (app.router, "lifespan_context", no_engine),
        (app, "user_middleware", list(app.user_middleware)),
        (app, "build_middleware_stack", app.build_middleware_stack),
        (app, "middleware_stack", None),
    ):
        monkeypatch.setattr(owner, name, value)
    monkeypatch.setattr(app.state, "openai_serving_chat", Handler(), raising=False)
    Ingress(ConserveConfig(), lambda _: False).wrap(app)
    BatchServer(app, BatchConfig(storage_dir=str(tmp_path)), api_key="k", serves_embeddings=False)
    add_api_key_middleware(app, api_key="k", admin_api_key=None)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
            yield client


def our_routes(app) -> list[tuple[str, str]]:
    routes = [
        r for r in app.routes if getattr(r, "path", "").startswith(("/v1/files", "/v1/batch"))
    ]
    return [(method, route.path) for route in routes for method in route.methods]


def test_sglang_has_no_such_routes_of_its_own(app):
    assert our_routes(app) == []


def test_sglang_has_the_routes_that_lines_go_to(app):
    posts = {r.path for r in app.routes if "POST" in (getattr(r, "methods", None) or ())}
    assert set(ENDPOINTS) <= posts


async def test_the_servers_key_is_asked_for_on_every_route(app, client):
    assert len(our_routes(app)) == 9
    for method, path in our_routes(app):
        for prefix in ("", "/offline"):
            assert (await client.request(method, prefix + path)).status_code == 401


async def test_a_line_is_an_offline_request_that_has_the_key(client):
    client.headers["Authorization"] = "Bearer k"
    files = {"file": ("in.jsonl", json.dumps(LINE).encode())}
    file = (await client.post("/v1/files", files=files, data={"purpose": "batch"})).json()
    asked = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "1h"}
    batch = (await client.post("/v1/batches", json=asked)).json()
    while batch["status"] != "completed":
        batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
        await asyncio.sleep(0.01)
    output = await client.get(f"/v1/files/{batch['output_file_id']}/content")
    answer = output.json()["response"]["body"]
    assert answer == {"class": "offline", "gone": False, "job": batch["id"]}
    asked["endpoint"] = "/v1/embeddings"
    assert (await client.post("/v1/batches", json=asked)).status_code == 400


def test_the_manager_says_when_it_stops_and_what_it_serves():
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    assert isinstance(inspect.getattr_static(TokenizerManager, "gracefully_exit"), property)
    assert "self.is_generation = " in inspect.getsource(TokenizerManager)
