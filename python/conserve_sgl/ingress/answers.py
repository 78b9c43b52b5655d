"""What the HTTP layer completes in SGLang's answers on their way out.

SGLang knows neither our path prefix nor OpenAI's service tiers: its redirects leave out the one,
its answers the other.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from conserve_sgl.ingress.classify import OFFLINE_PREFIX, names_tier
from conserve_sgl.policy.service_class import ServiceClass

__all__ = ["Message", "Send", "echo_tier", "keep_prefix", "tier_to_echo"]

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

_ECHOING = frozenset({"/v1/chat/completions", "/v1/responses"})
_TIER_OF = {ServiceClass.OFFLINE: b"flex", ServiceClass.ONLINE: b"default"}
# An object that has a tier in OpenAI's API: a whole answer, one chunk of a chat's stream, or the
# response inside an event of a response's stream. No text holds a bare newline or quote.
_OBJECT = re.compile(rb'\A(\{)(?="id":)')
_EVENT = re.compile(
    rb'^(data: \{(?:"type":"response\.[^\n]*?"response":\{)?)(?="id":)', re.MULTILINE
)


def keep_prefix(send: Send, *, root: str, host: bytes) -> Send:
    """A `send` for what came behind the offline prefix: a redirect names the prefix too, so that
    who follows it stays offline.

    Args:
        root: ASGI's root_path, which stands before the prefix.
        host: of the request; a redirect to another one is left as it is.
    """

    async def send_on(message: Message) -> None:
        if message["type"] == "http.response.start" and 300 <= message["status"] < 400:
            headers = [
                (name, _prefixed(value, root, host) if name.lower() == b"location" else value)
                for name, value in message["headers"]
            ]
            message = {**message, "headers": headers}
        await send(message)

    return send_on


def _prefixed(location: bytes, root: str, host: bytes) -> bytes:
    try:
        to = urlsplit(location.decode("latin-1"))
    except ValueError:  # the host in it is what the client sent, whatever that was
        return location
    if to.netloc not in ("", host.decode("latin-1")) or not to.path.startswith(f"{root}/"):
        return location
    path = f"{root}{OFFLINE_PREFIX}{to.path[len(root) :]}"
    return to._replace(path=path).geturl().encode("latin-1")


def tier_to_echo(path: str, body: bytes, asked: ServiceClass | None) -> bytes | None:
    """The tier for the answer to name; None where it names none: the request does not, OpenAI's
    answer has no such field, or `priority` decides only later.

    Args:
        path: the route.
        body: the JSON that was sent.
        asked: the class that tags in path, headers and body ask for.
    """
    if path not in _ECHOING or not names_tier(body):
        return None
    if asked is None and b'"priority"' not in body:
        asked = ServiceClass.ONLINE
    return None if asked is None else _TIER_OF[asked]


def echo_tier(send: Send, tier: bytes) -> Send:
    """A `send` that writes `service_tier` into a successful answer, JSON or a stream of events."""
    field = b'"service_tier":"%s",' % tier
    streams = False
    held: Message | None = None  # the start of JSON, whose length is not known yet

    async def send_on(message: Message) -> None:
        nonlocal streams, held
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            streams = kind.startswith(b"text/event-stream")
            if message["status"] == 200 and kind.startswith(b"application/json"):
                held = message
                return
        elif streams:
            body = _EVENT.sub(rb"\1" + field, message.get("body", b""))
            message = {**message, "body": body}
        elif held is not None:
            body, found = _OBJECT.subn(rb"\1" + field, message.get("body", b""))
            message = {**message, "body": body}
            start, held = held, None
            await send(_longer(start, len(field)) if found else start)
        await send(message)

    return send_on


def _longer(start: Message, by_bytes: int) -> Message:
    headers = [
        (name, b"%d" % (int(value) + by_bytes) if name == b"content-length" else value)
        for name, value in start["headers"]
    ]
    return {**start, "headers": headers}
