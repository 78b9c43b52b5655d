from __future__ import annotations

import asyncio

import pytest

from conserve_sgl.batch.server.dispatch import Aborted, Reply, post


async def call(app, abort: asyncio.Event | None = None) -> Reply:
    return await post(app, "/v1/x", {"x-a": "b"}, b'{"c": 1}', abort or asyncio.Event())


async def answer(send, status: int, *parts: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"X-B", b"d")]})
    for part in parts:
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body"})


async def test_the_application_sees_a_request_and_gives_an_answer():
    async def app(scope, receive, send):
        assert (scope["type"], scope["method"], scope["path"]) == ("http", "POST", "/v1/x")
        headers = dict(scope["headers"])
        assert headers[b"content-type"] == b"application/json"
        assert (headers[b"content-length"], headers[b"x-a"]) == (b"8", b"b")
        message = await receive()
        assert (message["body"], message["more_body"]) == (b'{"c": 1}', False)
        await answer(send, 201, b"e", b"f")

    assert await call(app) == Reply(201, {"x-b": "d"}, b"ef")


async def test_an_application_that_raises_is_an_answer_of_500():
    async def app(_scope, _receive, _send):
        raise RuntimeError

    assert (await call(app)).status == 500


async def test_an_answer_that_breaks_off_is_an_answer_of_500():
    async def app(_scope, _receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})

    assert (await call(app)).status == 500


@pytest.mark.parametrize("status", [200, 400])
async def test_a_client_that_goes_is_noticed(status):
    abort, started = asyncio.Event(), asyncio.Event()

    async def app(_scope, receive, send):
        await receive()
        started.set()
        assert (await receive())["type"] == "http.disconnect"
        await answer(send, status, b"{}")

    calling = asyncio.create_task(call(app, abort))
    await started.wait()
    abort.set()
    if status == 200:  # it was done just then
        assert (await calling).status == 200
    else:
        with pytest.raises(Aborted):
            await calling


async def test_an_application_that_does_not_notice_is_cancelled(monkeypatch):
    monkeypatch.setattr("conserve_sgl.batch.server.dispatch.ABORT_S", 0.01)
    abort, cancelled = asyncio.Event(), asyncio.Event()
    abort.set()

    async def app(_scope, _receive, _send):
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(Aborted):
        await call(app, abort)
    assert cancelled.is_set()


async def test_a_caller_that_is_cancelled_leaves_nothing_running():
    started, ended = asyncio.Event(), asyncio.Event()

    async def app(_scope, _receive, _send):
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    calling = asyncio.create_task(call(app))
    await started.wait()
    calling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await calling
    assert ended.is_set()
