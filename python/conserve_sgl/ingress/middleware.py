"""The outermost ASGI layer: finds the service class, and bounds the offline work taken in.

It stands outside SGLang's own middlewares, so that authorisation, metrics and routing see the
path that the request really reaches, `/offline` gone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from conserve_sgl.ingress.answers import Message, Send, echo_tier, keep_prefix, tier_to_echo
from conserve_sgl.ingress.classify import (
    AskedJob,
    class_from_body,
    class_from_headers,
    job_from_body,
    job_from_headers,
    split_prefix,
)
from conserve_sgl.ingress.drain import Drain
from conserve_sgl.ingress.in_hand import InHand
from conserve_sgl.ingress.spare import SpareRoom
from conserve_sgl.policy.service_class import ServiceClass

__all__ = [
    "SPARE_AFTER_HEADER",
    "SPARE_HEADER",
    "ServiceClassMiddleware",
    "asked_class",
    "asked_job",
]

Receive = Callable[[], Awaitable[Message]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

asked_class: ContextVar[ServiceClass | None] = ContextVar("conserve_asked_class", default=None)
"""What the HTTP request in hand asked for; read where the request object is at hand."""

asked_job: ContextVar[AskedJob | None] = ContextVar("conserve_asked_job", default=None)
"""The job it named; it counts only when the request turns out to be offline."""

SPARE_HEADER = b"x-sgl-conserve-spare"
"""Of every answer to who asks as offline work: how many more requests would be taken now."""

SPARE_AFTER_HEADER = b"x-sgl-conserve-spare-after-ms"
"""How long the request was here when that was said: what its client sent later had not been seen,
and takes of it."""

_GENERATING = frozenset(
    {
        "/generate",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
    }
)


class ServiceClassMiddleware:
    """Sets `asked_class` and `asked_job` around the wrapped application.

    Args:
        app: the application, with all its own middlewares.
        max_offline: offline requests in hand at a time; one more is answered 429.
        retry_after_s: what that answer's Retry-After says at least, in seconds; more when places
            become free more slowly.
        on_refusal: called at every 429 of this layer.
        in_hand: counts the offline requests in hand, here and in the server's other processes.
        room: tells what the engine would take now, once it can be told.
        take_spare_only: answer 429 beyond that, too, so that what would wait here for long can go
            to another server. While it cannot be told, one request is taken.
    """

    def __init__(
        self,
        app: App,
        *,
        max_offline: int,
        retry_after_s: int,
        on_refusal: Callable[[], None] = lambda: None,
        in_hand: InHand | None = None,
        room: Callable[[], SpareRoom | None] = lambda: None,
        take_spare_only: bool = False,
    ) -> None:
        self._app = app
        self._max_offline = max_offline
        self._drain = Drain(retry_after_s)
        self._on_refusal = on_refusal
        self._room = room
        self._take_spare_only = take_spare_only
        self.in_hand = in_hand or InHand()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        came_s = time.monotonic()
        scope, path, prefixed = _without_prefix(scope)
        if prefixed:
            host = dict(scope["headers"]).get(b"host", b"")
            send = keep_prefix(send, root=scope.get("root_path", ""), host=host)
        try:
            asked = ServiceClass.OFFLINE if prefixed else class_from_headers(scope["headers"])
            job = job_from_headers(scope["headers"])
            if await self._refused(asked, path, send):
                return  # without reading what it sends
            if path in _GENERATING and scope["method"] in ("POST", "PUT"):
                body, receive = await _read_body(receive)
                if asked is not ServiceClass.ONLINE:
                    asked = asked or _class_of(path, body)
                    job |= job_from_body(body)
                if tier := tier_to_echo(path, body, asked):
                    send = echo_tier(send, tier)
        except ValueError as e:
            await _answer(send, 400, str(e))
            return
        await self._run(scope, path, receive, send, asked, job, came_s)

    async def _run(
        self,
        scope: MutableMapping[str, Any],
        path: str,
        receive: Receive,
        send: Send,
        asked: ServiceClass | None,
        job: AskedJob,
        came_s: float,
    ) -> None:
        if await self._refused(asked, path, send):
            return
        counted = _is_bounded(asked, path)
        if counted:
            self._goes_on()
        tokens = asked_class.set(asked), asked_job.set(job)
        try:
            send_on = self._with_hints(send, asked, came_s, counted=counted)
            await self._app(scope, receive, send_on)
        finally:
            asked_class.reset(tokens[0])
            asked_job.reset(tokens[1])
            if counted:
                self.in_hand.end()
                self._drain.freed(time.monotonic())

    def _goes_on(self) -> None:
        self._left()
        self.in_hand.begin()

    def _left(self) -> int | None:
        """Offline requests that the engine would take now; None where nobody knows."""
        room = self._room()
        return None if room is None else room.left()

    async def _refused(self, asked: ServiceClass | None, path: str, send: Send) -> bool:
        if not _is_bounded(asked, path) or not self._is_full():
            return False
        self._on_refusal()
        full = f"{self.in_hand.now()} offline requests are in hand already; try again later"
        wait_s = self._drain.wait_s(time.monotonic())
        await _answer(send, 429, full, {b"retry-after": wait_s, SPARE_HEADER: 0})
        return True

    def _is_full(self) -> bool:
        if self.in_hand.now() >= self._max_offline:
            return True
        if not self._take_spare_only:
            return False
        left = self._left()
        # A scheduler that sleeps says nothing, and wakes up for a request.
        return self.in_hand.now() > 0 if left is None else left == 0

    def _with_hints(
        self, send: Send, asked: ServiceClass | None, came_s: float, *, counted: bool
    ) -> Send:
        """A `send` that says when to come back where the scheduler refused, its queue full (429) or
        the server about to end (503), and how much more offline work would be taken."""

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                hints = self._hints(message["status"], asked, came_s, counted=counted)
                headers = [*message["headers"], *((k, b"%d" % v) for k, v in hints.items())]
                message = {**message, "headers": headers}
            await send(message)

        return send_on

    def _hints(
        self, status: int, asked: ServiceClass | None, came_s: float, *, counted: bool
    ) -> dict[bytes, int]:
        hints = {}
        if status == 429:
            hints[b"retry-after"] = self._drain.wait_s(time.monotonic())
        elif status == 503 and counted:
            hints[b"retry-after"] = self._drain.shortest_s
        # Whoever asks for anything as offline work, the model's name say, is about to send some.
        if asked is ServiceClass.OFFLINE and (left := self._left()) is not None:
            hints[SPARE_HEADER] = 0 if status in (429, 503) else left
            hints[SPARE_AFTER_HEADER] = int(1000 * (time.monotonic() - came_s))
        return hints


def _without_prefix(
    scope: MutableMapping[str, Any],
) -> tuple[MutableMapping[str, Any], str, bool]:
    """The scope without the offline prefix, the route's path in it, and whether it had the prefix.

    A server behind `--fastapi-root-path` gets that path before all others, the prefix too.
    """
    root = scope.get("root_path", "")
    root = root if scope["path"].startswith(f"{root}/") else ""
    path, prefixed = split_prefix(scope["path"].removeprefix(root))
    if prefixed:
        raw_path = scope.get("raw_path", b"").decode("latin-1").removeprefix(root)
        raw_path = root + split_prefix(raw_path)[0]
        scope = {**scope, "path": root + path, "raw_path": raw_path.encode("latin-1")}
    return scope, path, prefixed


def _is_bounded(asked: ServiceClass | None, path: str) -> bool:
    return asked is ServiceClass.OFFLINE and path in _GENERATING


def _class_of(path: str, body: bytes) -> ServiceClass | None:
    asked = class_from_body(body)
    if path == "/v1/responses" and asked is None and b'"priority"' not in body:
        # SGLang lowers the priority of each turn after a tool call: not a class.
        return ServiceClass.ONLINE
    return asked


async def _read_body(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, and a `receive` that gives it again and then goes on as before."""
    messages: list[Message] = []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body", False):
            break
    body = b"".join(m.get("body", b"") for m in messages)
    replay = iter(messages)

    async def receive_again() -> Message:
        message = next(replay, None)
        return await receive() if message is None else message

    return body, receive_again


async def _answer(
    send: Send, status: int, message: str, hints: Mapping[bytes, int] = MappingProxyType({})
) -> None:
    """An error in SGLang's and OpenAI's shape."""
    error = {"object": "error", "message": message, "type": str(status), "code": status}
    body = json.dumps({**error, "error": {**error, "param": None}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name, b"%d" % value) for name, value in hints.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
