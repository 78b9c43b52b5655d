"""Sends one request through the server's own ASGI application, in its own process.

No socket, no port, and no client that could time out. What arrives is an HTTP request like any
other: the service class is read, the API key is checked, and the route answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from typing import Any

import msgspec

__all__ = ["Aborted", "Application", "Reply", "post"]

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Application = Callable[..., Awaitable[None]]

ABORT_S = 15.0
"""SGLang looks for a client that has gone every 4 s; a handler that takes longer is cancelled."""


class Aborted(Exception):
    """The request was given up before it was answered."""


class Reply(msgspec.Struct, frozen=True):
    """An HTTP answer; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


async def post(
    app: Application, path: str, headers: dict[str, str], body: bytes, abort: asyncio.Event
) -> Reply:
    """POST the JSON `body` to `path`; once `abort` is set, the client is gone.

    Raises:
        Aborted: `abort` was set, and there was no good answer at that time.
    """
    exchange = _Exchange(body, abort)
    call = asyncio.create_task(exchange.run(app, _scope(path, headers, len(body))))
    gone = asyncio.create_task(abort.wait())
    try:
        await asyncio.wait((call, gone), return_when=asyncio.FIRST_COMPLETED)
        if not call.done():
            await asyncio.wait((call,), timeout=ABORT_S)
    finally:
        for task in (call, gone):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await call
    reply = exchange.reply()
    if abort.is_set() and (reply is None or reply.status != 200):
        raise Aborted
    return reply or Reply(500, {}, b'{"error": {"message": "the route gave no answer"}}')


class _Exchange:
    """One request and what has come back for it."""

    def __init__(self, body: bytes, abort: asyncio.Event) -> None:
        self._request: bytes | None = body
        self._abort = abort
        self._status: int | None = None
        self._headers: dict[str, str] = {}
        self._parts: list[bytes] = []
        self._complete = False

    async def run(self, app: Application, scope: dict[str, Any]) -> None:
        try:
            await app(scope, self.receive, self.send)
        except Exception:  # the application's own handlers have answered 500
            if not self._abort.is_set():
                logger.exception("a batch's request to %s failed", scope["path"])

    async def receive(self) -> Message:
        if self._request is not None:
            body, self._request = self._request, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._abort.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = {
                k.decode("latin-1").lower(): v.decode("latin-1")
                for k, v in message.get("headers", ())
            }
        elif message["type"] == "http.response.body":
            self._parts.append(message.get("body", b""))
            self._complete = not message.get("more_body", False)

    def reply(self) -> Reply | None:
        """The answer, or None when there is no whole one."""
        if self._status is None or not self._complete:
            return None
        return Reply(self._status, self._headers, b"".join(self._parts))


def _scope(path: str, headers: dict[str, str], length: int) -> dict[str, Any]:
    all_headers = {"host": "localhost", "content-type": "application/json"}
    all_headers |= {"content-length": str(length)} | headers
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(k.encode(), v.encode("latin-1")) for k, v in all_headers.items()],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 80),
        "state": {},
    }
