"""The outermost ASGI layer, in front of a tiny application that says what reached it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.routing import Route

from conserve_sgl.ingress.classify import AskedJob
from conserve_sgl.ingress.middleware import ServiceClassMiddleware, asked_class, asked_job
from conserve_sgl.policy import ServiceClass

ONLINE, OFFLINE = ServiceClass.ONLINE, ServiceClass.OFFLINE
CHAT = "/v1/chat/completions"
FLEX = json.dumps({"service_tier": "flex"}).encode()
ROUTES = [
    "/generate",
    CHAT,
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
]


@dataclass
class Seen:
    """What the application behind the layer saw of one request."""

    asked: ServiceClass | None
    job: AskedJob | None
    scope: dict[str, Any]
    body: bytes


@dataclass
class Recorder:
    """An application that reads the body, notes what it saw and answers 200."""

    seen: list[Seen] = field(default_factory=list)

    async def __call__(self, scope, receive, send) -> None:
        request = Request(scope, receive)
        body = await request.body()
        self.seen.append(Seen(asked_class.get(), asked_job.get(), dict(scope), body))
        await PlainTextResponse("done")(scope, receive, send)


@dataclass
class Gate:
    """An application that holds every request until it is opened."""

    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope, receive, send) -> None:
        await self.opened.wait()
        await PlainTextResponse("done")(scope, receive, send)


def layer(app: Any, max_offline: int = 100) -> ServiceClassMiddleware:
    return ServiceClassMiddleware(app, max_offline=max_offline, retry_after_s=7)


def client(app: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://engine")


async def post(app: Any, path: str, **kwargs: Any) -> httpx.Response:
    async with client(app) as http:
        return await http.post(path, **kwargs)


async def seen_of(path: str, **kwargs: Any) -> Seen:
    """What reaches the application when `path` is posted to."""
    recorder = Recorder()
    response = await post(layer(recorder), path, **kwargs)
    assert response.status_code == 200
    (seen,) = recorder.seen
    return seen


async def in_flight(middleware: ServiceClassMiddleware, n: int) -> None:
    """Return when `n` offline requests are in hand; the test's timeout is the bound."""
    while middleware.in_hand.now() != n:
        await asyncio.sleep(0)


# ----------------------------------------------------------------- the class


@pytest.mark.parametrize(
    ("path", "headers", "body", "asked"),
    [
        pytest.param("/generate", {}, b"{}", None, id="untagged asks for nothing"),
        pytest.param("/offline/generate", {}, b"{}", OFFLINE, id="path prefix"),
        pytest.param(f"/offline{CHAT}", {}, b"{}", OFFLINE, id="path prefix of an OpenAI route"),
        pytest.param(
            "/generate", {"X-SGL-Conserve-Class": "offline"}, b"{}", OFFLINE, id="our header"
        ),
        pytest.param("/generate", {"X-SMG-Priority": "bulk"}, b"{}", OFFLINE, id="gateway header"),
        pytest.param(CHAT, {}, FLEX, OFFLINE, id="service tier of a chat"),
        pytest.param("/v1/completions", {}, FLEX, OFFLINE, id="service tier of a completion"),
        pytest.param("/generate", {}, FLEX, OFFLINE, id="service tier of SGLang's own route"),
        pytest.param("/v1/responses", {}, FLEX, OFFLINE, id="service tier of a response"),
        pytest.param(CHAT, {}, b'{"service_tier": "default"}', ONLINE, id="the default tier"),
        pytest.param(
            CHAT, {"X-SGL-Conserve-Class": "online"}, FLEX, ONLINE, id="a header beats the tier"
        ),
        pytest.param(
            "/offline/generate",
            {"X-SGL-Conserve-Class": "online"},
            b"{}",
            OFFLINE,
            id="the prefix beats the header",
        ),
        pytest.param("/v1/models", {}, FLEX, None, id="a tier elsewhere is nobody's"),
        pytest.param(CHAT, {}, b"not json", None, id="a body that is no JSON"),
        pytest.param(CHAT, {}, b"", None, id="no body"),
    ],
)
async def test_the_class_asked_for(path, headers, body, asked):
    assert (await seen_of(path, headers=headers, content=body)).asked is asked


async def test_a_class_that_is_none_is_answered_400_and_names_the_header():
    recorder = Recorder()
    response = await post(layer(recorder), "/generate", headers={"x-sgl-conserve-class": "batch"})
    assert response.status_code == 400
    assert "x-sgl-conserve-class" in response.json()["error"]["message"]
    assert "batch" in response.json()["error"]["message"]
    assert recorder.seen == []


async def test_the_class_is_gone_after_the_request():
    await seen_of("/offline/generate")
    assert asked_class.get() is None


async def test_requests_at_the_same_time_keep_their_classes_apart():
    async def echo(request: Request) -> PlainTextResponse:
        await request.body()
        await asyncio.sleep(0)
        return PlainTextResponse(str(asked_class.get()))

    app = layer(Starlette(routes=[Route("/generate", echo, methods=["POST"])]))
    paths = ["/offline/generate", "/generate"] * 4
    answers = await asyncio.gather(*(post(app, path) for path in paths))
    assert [a.text for a in answers] == [str(OFFLINE), "None"] * 4


# ------------------------------------------------------------------- the job


@pytest.mark.parametrize(
    ("path", "headers", "body", "job"),
    [
        pytest.param("/generate", {}, {}, AskedJob(), id="none"),
        pytest.param(
            "/offline/generate", {"X-SGL-Conserve-Job": "a"}, {}, AskedJob("a"), id="our header"
        ),
        pytest.param(
            f"/offline{CHAT}",
            {"x-sgl-conserve-deadline-s": "60"},
            {"metadata": {"conserve_job": "a", "conserve_deadline_s": "9"}},
            AskedJob("a", 60.0),
            id="a header beats the body, each field for itself",
        ),
        pytest.param(
            CHAT,
            {},
            {"service_tier": "flex", "metadata": {"conserve_job": "a"}},
            AskedJob("a"),
            id="the body of a request that its tier makes offline",
        ),
        pytest.param(
            "/generate",
            {},
            {"priority": -1, "metadata": {"conserve_job": "a"}},
            AskedJob("a"),
            id="of one that may yet turn out to be offline",
        ),
    ],
)
async def test_the_job_named(path, headers, body, job):
    assert (await seen_of(path, headers=headers, json=body)).job == job
    assert asked_job.get() is None


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"x-sgl-conserve-deadline-s": "tomorrow"}, {}),
        ({"x-sgl-conserve-job": "x" * 129}, {}),
        ({}, {"metadata": {"conserve_deadline_s": "tomorrow"}}),
        ({}, {"metadata": {"conserve_job": ""}}),
    ],
)
async def test_a_job_that_cannot_be_used_is_answered_400_and_says_where(headers, body):
    recorder = Recorder()
    response = await post(layer(recorder), "/offline/generate", headers=headers, json=body)
    assert response.status_code == 400
    where = next(iter(headers or body["metadata"]))
    assert where in response.json()["error"]["message"]
    assert recorder.seen == []


# ------------------------------------------------------------- what goes down


async def test_the_prefix_is_gone_from_path_and_raw_path():
    seen = await seen_of("/offline/v1/models/a%2Fb?x=1&y=%2Foffline")
    assert seen.scope["path"] == "/v1/models/a/b"
    assert seen.scope["raw_path"] == b"/v1/models/a%2Fb"
    assert seen.scope["query_string"] == b"x=1&y=%2Foffline"


async def test_the_scope_of_the_server_is_not_changed():
    scope = http_scope("/offline/generate")
    before = dict(scope)
    await layer(Recorder())(scope, chunks(b"{}"), nowhere)
    assert scope == before


async def test_a_scope_without_raw_path_is_served():
    scope = http_scope("/offline/generate")
    del scope["raw_path"]
    recorder = Recorder()
    await layer(recorder)(scope, chunks(b"{}"), nowhere)
    assert recorder.seen[0].scope["path"] == "/generate"


@pytest.mark.parametrize("path", [*ROUTES, f"/offline{CHAT}", "/v1/models"])
@pytest.mark.parametrize(
    "body",
    [
        pytest.param(FLEX, id="JSON"),
        pytest.param(b"not json \xff\x00", id="no JSON"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"x" * 3_000_000, id="three megabytes"),
    ],
)
async def test_the_body_arrives_as_it_was_sent(path, body):
    assert (await seen_of(path, content=body)).body == body


async def test_a_body_in_several_chunks_is_read_whole_and_arrives_whole():
    recorder = Recorder()
    pieces = [b'{"service', b'_tier": ', b"", b'"flex"}']
    await layer(recorder)(http_scope(CHAT), chunks(*pieces), nowhere)
    assert recorder.seen[0].asked is OFFLINE
    assert recorder.seen[0].body == b'{"service_tier": "flex"}'


async def test_a_disconnect_after_the_body_is_seen_by_the_application():
    heard: list[str] = []

    async def app(_scope, receive, _send) -> None:
        for _ in range(3):
            heard.append((await receive())["type"])

    await layer(app)(http_scope(CHAT), chunks(b"{", b"}"), nowhere)
    assert heard == ["http.request", "http.request", "http.disconnect"]


async def test_a_client_that_leaves_while_it_sends_is_seen_by_the_application():
    async def app(scope, receive, _send) -> None:
        await Request(scope, receive).body()

    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> dict[str, Any]:
        return next(messages, {"type": "http.disconnect"})

    with pytest.raises(ClientDisconnect):
        await layer(app)(http_scope(CHAT), receive, nowhere)


async def test_a_get_is_passed_on_without_reading():
    async def app(scope, _receive, send) -> None:
        await PlainTextResponse("alive")(scope, never, send)

    async def never() -> dict[str, Any]:
        raise AssertionError("read")

    await layer(app)(http_scope("/generate", method="GET"), never, nowhere)


@pytest.mark.parametrize("path", ["/health", "/health_generate", "/metrics", "/v1/models"])
async def test_probes_pass_untouched_and_are_never_refused(path):
    recorder = Recorder()
    full = layer(recorder, max_offline=0)
    async with client(full) as http:
        assert (await http.get(path)).status_code == 200
        assert (await http.get(f"/offline{path}")).status_code == 200
    assert recorder.seen[0].asked is None
    assert recorder.seen[0].scope["path"] == recorder.seen[1].scope["path"] == path


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
async def test_other_scopes_pass_untouched(kind):
    passed: list[tuple[Any, ...]] = []

    async def app(*args: Any) -> None:
        passed.append(args)

    given = ({"type": kind}, nowhere, nowhere)
    await layer(app, max_offline=0)(*given)
    assert passed == [given]
    assert passed[0][0] is given[0]


# ----------------------------------------------------------------- streaming


async def generator_sees() -> AsyncIterator[bytes]:
    for _ in range(3):
        await asyncio.sleep(0)
        yield f"{asked_class.get()} ".encode()


async def stream(_request: Request) -> StreamingResponse:
    return StreamingResponse(generator_sees())


async def pass_on(request: Request, call_next: Any) -> Any:
    return await call_next(request)


@pytest.mark.parametrize("with_http_middleware", [False, True])
async def test_a_stream_sees_the_class_to_its_end(with_http_middleware):
    app = Starlette(routes=[Route("/generate", stream, methods=["POST"])])
    if with_http_middleware:
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    response = await post(layer(app), "/offline/generate")
    assert response.text == f"{OFFLINE} " * 3


# --------------------------------------------------------------- the 429


async def test_one_more_than_the_bound_is_answered_429_with_retry_after():
    gate = Gate()
    middleware = layer(gate, max_offline=2)
    held = [asyncio.create_task(post(middleware, "/offline/generate")) for _ in range(2)]
    await in_flight(middleware, 2)

    refused = await post(middleware, CHAT, content=FLEX)
    assert refused.status_code == 429
    assert refused.headers["retry-after"] == "7"
    assert refused.headers["content-type"] == "application/json"
    error = refused.json()["error"]
    assert error["code"] == 429
    assert "2 offline requests" in error["message"]

    gate.opened.set()
    assert [r.status_code for r in await asyncio.gather(*held)] == [200, 200]
    assert (await post(middleware, "/offline/generate")).status_code == 200
    assert middleware.in_hand.now() == 0


@pytest.mark.parametrize("path", ROUTES)
async def test_every_generating_route_is_bounded(path):
    assert (await post(layer(Recorder(), max_offline=0), f"/offline{path}")).status_code == 429


@pytest.mark.parametrize(
    "headers", [{}, {"x-sgl-conserve-class": "online"}], ids=["untagged", "tagged online"]
)
async def test_online_requests_are_never_refused(headers):
    full = layer(Recorder(), max_offline=0)
    assert (await post(full, "/generate", headers=headers)).status_code == 200


async def test_an_error_of_the_application_gives_the_place_back():
    async def app(_scope, _receive, _send) -> None:
        raise RuntimeError("broken")

    middleware = layer(app, max_offline=1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken"):
            await post(middleware, "/offline/generate")
    assert middleware.in_hand.now() == 0


async def test_a_client_that_leaves_gives_the_place_back():
    middleware = layer(Gate(), max_offline=1)
    request = asyncio.create_task(post(middleware, "/offline/generate"))
    await in_flight(middleware, 1)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert middleware.in_hand.now() == 0


async def test_a_stream_holds_its_place_to_its_end():
    released = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"first"
        await released.wait()
        yield b"last"

    async def route(_request: Request) -> StreamingResponse:
        return StreamingResponse(slow())

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    app = Starlette(routes=[Route("/generate", route, methods=["POST"])])
    middleware = layer(app, max_offline=1)
    stay = asyncio.Event()
    body = chunks(b"{}")

    async def receive() -> dict[str, Any]:
        message = await body()
        if message["type"] == "http.disconnect":
            await stay.wait()
        return message

    streaming = asyncio.create_task(middleware(http_scope("/offline/generate"), receive, send))
    while len(sent) < 2:
        await asyncio.sleep(0)
    assert middleware.in_hand.now() == 1
    assert (await post(middleware, "/offline/generate")).status_code == 429
    released.set()
    await streaming
    assert middleware.in_hand.now() == 0


async def test_a_429_from_further_in_says_when_to_come_back():
    async def app(scope, receive, send) -> None:
        await JSONResponse({}, status_code=429, headers={"x-kept": "1"})(scope, receive, send)

    response = await post(layer(app), "/generate", content=b'{"priority": -1}')
    assert response.status_code == 429
    assert response.headers["retry-after"] == "7"
    assert response.headers["x-kept"] == "1"


@pytest.mark.parametrize(
    ("path", "status"),
    [*(("/offline/generate", status) for status in (200, 400, 500)), ("/generate", 503)],
)
async def test_no_other_status_says_so(path, status):
    async def app(scope, receive, send) -> None:
        await JSONResponse({}, status_code=status)(scope, receive, send)

    assert "retry-after" not in (await post(layer(app), path)).headers


async def test_offline_requests_that_a_leaving_server_refuses_may_come_back_soon():
    async def app(scope, receive, send) -> None:
        await JSONResponse({}, status_code=503)(scope, receive, send)

    answer = await post(layer(app), "/offline/generate")
    assert answer.headers["retry-after"] == "7"


async def test_a_refusal_does_not_wait_for_the_body_and_is_counted():
    refusals: list[int] = []

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was asked for")

    full = ServiceClassMiddleware(
        Recorder(), max_offline=0, retry_after_s=7, on_refusal=lambda: refusals.append(1)
    )
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    await full(http_scope("/offline/generate"), receive, send)
    assert sent[0]["status"] == 429
    assert (await post(full, "/generate", json={"service_tier": "flex"})).status_code == 429
    assert (await post(full, "/generate")).status_code == 200
    assert len(refusals) == 2


async def test_an_answer_that_is_an_error_gives_the_place_back():
    async def app(scope, receive, send) -> None:
        await JSONResponse({}, status_code=500)(scope, receive, send)

    middleware = layer(app, max_offline=1)
    assert (await post(middleware, "/offline/generate")).status_code == 500
    assert (await post(middleware, "/offline/generate")).status_code == 500


# -------------------------------------------------------------------- helpers


def http_scope(path: str, method: str = "POST") -> dict[str, Any]:
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
    }


def chunks(*bodies: bytes) -> Any:
    """A `receive` that gives a body in several messages, then says that the client has gone."""
    last = len(bodies) - 1
    messages = iter(
        {"type": "http.request", "body": body, "more_body": i < last}
        for i, body in enumerate(bodies)
    )

    async def receive() -> dict[str, Any]:
        return next(messages, {"type": "http.disconnect"})

    return receive


async def nowhere(*_message: Any) -> None:
    pass
