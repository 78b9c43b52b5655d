"""What the HTTP layer adds to answers: the prefix to redirects, the tier to what asked for one."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, StreamingResponse
from starlette.routing import Route

from conserve_sgl.ingress.answers import keep_prefix
from conserve_sgl.ingress.middleware import ServiceClassMiddleware, asked_class
from conserve_sgl.policy import ServiceClass

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"


def http(app: Any, root: str = "") -> httpx.AsyncClient:
    layer = ServiceClassMiddleware(app, max_offline=9, retry_after_s=1)
    transport = httpx.ASGITransport(app=layer, root_path=root)
    return httpx.AsyncClient(transport=transport, base_url="http://engine:30000")


# ---------------------------------------------------------------- redirects


async def who_am_i(_request: Request) -> JSONResponse:
    return JSONResponse({"class": str(asked_class.get())})


async def elsewhere(request: Request) -> RedirectResponse:
    return RedirectResponse(request.query_params["to"])


ROUTER = Starlette(
    routes=[
        Route("/generate", who_am_i, methods=["POST"]),
        Route(CHAT, who_am_i, methods=["POST"]),
        Route("/models/", who_am_i),
        Route("/elsewhere", elsewhere),
    ]
)


@pytest.mark.parametrize("path", ["/generate/", f"{CHAT}/", "/generate//"])
async def test_a_redirect_for_a_slash_too_many_stays_offline(path):
    async with http(ROUTER) as client:
        answer = await client.post(f"/offline{path}?a=b", json={})
        assert answer.status_code == 307
        wanted = f"http://engine:30000/offline{path.rstrip('/')}?a=b"
        assert answer.headers["location"] == wanted
        followed = await client.post(f"/offline{path}", json={}, follow_redirects=True)
        assert followed.json() == {"class": str(ServiceClass.OFFLINE)}


async def test_a_redirect_for_a_slash_too_few_keeps_the_prefix():
    async with http(ROUTER) as client:
        answer = await client.get("/offline/models")
        assert answer.headers["location"] == "http://engine:30000/offline/models/"


async def test_a_redirect_of_what_came_without_the_prefix_is_left():
    async with http(ROUTER) as client:
        answer = await client.post("/generate/", headers={"x-sgl-conserve-class": "offline"})
        assert answer.headers["location"] == "http://engine:30000/generate"


@pytest.mark.parametrize(
    ("to", "wanted"),
    [
        pytest.param("/generate", "/offline/generate", id="a path alone"),
        pytest.param("generate", "generate", id="a path beside this one"),
        pytest.param("http://other/generate", "http://other/generate", id="another host"),
    ],
)
async def test_where_a_redirect_leads(to, wanted):
    async with http(ROUTER) as client:
        answer = await client.get("/offline/elsewhere", params={"to": to})
        assert answer.headers["location"] == wanted


async def test_a_redirect_to_what_is_no_url_is_left():
    sent = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"location", b"http://[::1/generate")]  # the host is what a client sent
    redirect = {"type": "http.response.start", "status": 307, "headers": headers}
    await keep_prefix(send, root="", host=b"[::1")(redirect)
    assert sent == [redirect]


@pytest.mark.parametrize("body", [{}, {"service_tier": "flex"}], ids=["prefix", "tier"])
async def test_below_the_root_path_of_a_server_the_class_is_read_too(body):
    prefix = "" if body else "/offline"
    async with http(ROUTER, root="/llm") as client:
        answer = await client.post(f"/llm{prefix}{CHAT}/", json=body)
        assert answer.headers["location"] == f"http://engine:30000/llm{prefix}{CHAT}"
        answer = await client.post(f"/llm{prefix}{CHAT}", json=body)
        assert answer.json() == {"class": str(ServiceClass.OFFLINE)}


# --------------------------------------------------------------- the tier


def events(*events: dict[str, Any]) -> str:
    return "".join(f"data: {json.dumps(e, separators=(',', ':'))}\n\n" for e in events)


async def answer(request: Request) -> JSONResponse | StreamingResponse:
    """As SGLang's: a whole answer, or a stream with the same object in each event."""
    body = await request.json()
    text = 'data: {"id": 1}\n{"id": 2} "response":{"id": 3}'
    whole = {"id": "a", "choices": [{"text": text}], "metadata": body.get("metadata")}
    if not body.get("stream"):
        return JSONResponse(whole, status_code=body.get("status", 200))
    if request.url.path == CHAT:
        pieces = [events(whole), events(whole, whole), "data: [DONE]\n\n"]
    else:
        created = {"type": "response.created", "sequence_number": 0, "response": whole}
        delta = {"type": "response.output_text.delta", "delta": text}
        pieces = ["event: response.created\n" + events(created), events(delta)]
    return StreamingResponse(iter(pieces), media_type="text/event-stream")


TIERED = Starlette(
    routes=[
        Route(path, answer, methods=["POST"])
        for path in (CHAT, RESPONSES, "/v1/completions", "/generate")
    ]
)


@pytest.mark.parametrize(
    ("path", "headers", "body", "tier"),
    [
        pytest.param(CHAT, {}, {"service_tier": "flex"}, "flex", id="flex"),
        pytest.param(RESPONSES, {}, {"service_tier": "flex"}, "flex", id="flex, a response"),
        pytest.param(CHAT, {}, {"service_tier": "default"}, "default", id="default"),
        pytest.param(
            CHAT, {}, {"service_tier": "priority"}, "default", id="what served it, not what asked"
        ),
        pytest.param(CHAT, {}, {"service_tier": "auto"}, "default", id="auto"),
        pytest.param(
            f"/offline{CHAT}", {}, {"service_tier": "auto"}, "flex", id="auto, by the prefix"
        ),
        pytest.param(
            CHAT,
            {"x-sgl-conserve-class": "online"},
            {"service_tier": "flex"},
            "default",
            id="a header beats the tier",
        ),
        pytest.param(
            CHAT, {}, {"service_tier": "auto", "priority": -1}, None, id="decided too late"
        ),
        pytest.param(f"/offline{CHAT}", {}, {}, None, id="not asked for"),
        pytest.param(CHAT, {}, {"service_tier": None}, None, id="null"),
        pytest.param(CHAT, {}, {"metadata": {"service_tier": "flex"}}, None, id="deeper down"),
        pytest.param("/v1/completions", {}, {"service_tier": "flex"}, None, id="completions"),
        pytest.param("/generate", {}, {"service_tier": "flex"}, None, id="not OpenAI's route"),
        pytest.param(
            CHAT, {}, {"service_tier": "flex", "status": 400}, None, id="an answer that is none"
        ),
    ],
)
async def test_an_answer_names_the_tier_that_served_it(path, headers, body, tier):
    async with http(TIERED) as client:
        got = await client.post(path, json=body, headers=headers)
        stock = await client.post(path, json={**body, "service_tier": None}, headers=headers)
    assert int(got.headers["content-length"]) == len(got.content)
    wanted = stock.json() if tier is None else {**stock.json(), "service_tier": tier}
    assert got.json() == wanted
    assert list(got.json().items())[-1] == list(stock.json().items())[-1]


async def test_every_chunk_of_a_chat_names_the_tier():
    async with http(TIERED) as client:
        got = await client.post(CHAT, json={"service_tier": "flex", "stream": True})
        stock = await client.post(CHAT, json={"stream": True})
    *chunks, done = got.text.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    assert [json.loads(c.removeprefix("data: "))["service_tier"] for c in chunks] == ["flex"] * 3
    assert got.text.replace('"service_tier":"flex",', "") == stock.text


async def test_the_response_in_an_event_names_the_tier_and_other_events_are_left():
    async with http(TIERED) as client:
        got = await client.post(RESPONSES, json={"service_tier": "flex", "stream": True})
        stock = await client.post(RESPONSES, json={"stream": True})
    created, delta = (
        json.loads(line.removeprefix("data: "))
        for line in got.text.splitlines()
        if line.startswith("data: ")
    )
    assert created["response"]["service_tier"] == "flex"
    assert "service_tier" not in delta
    assert got.text.replace('"service_tier":"flex",', "") == stock.text
