"""Reads the service class that a client asked for from an HTTP request. Pure.

Several equivalent tags are read because none survives every client and every gateway
(docs/service-class.md has the table):

    path prefix     /offline/v1/chat/completions
    header          x-sgl-conserve-class: offline, or x-smg-priority: bulk
    body            "service_tier": "flex"
    body            "priority", read later by `PriorityRule`, where SGLang has parsed it
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from conserve_sgl.policy.service_class import ServiceClass

__all__ = ["OFFLINE_PREFIX", "class_from_body", "class_from_headers", "split_prefix"]

OFFLINE_PREFIX = "/offline"

_CLASS_HEADER = b"x-sgl-conserve-class"
_GATEWAY_HEADER = b"x-smg-priority"
_TIERS = {
    "flex": ServiceClass.OFFLINE,
    "default": ServiceClass.ONLINE,
    "priority": ServiceClass.ONLINE,
}


class _Tagged(msgspec.Struct):
    """The one field of a request body that matters here; the rest is skipped, not parsed."""

    service_tier: object = None


_decoder = msgspec.json.Decoder(_Tagged)


def split_prefix(path: str) -> tuple[str, bool]:
    """`path` without the offline prefix, and whether it had it."""
    if path == OFFLINE_PREFIX or path.startswith(OFFLINE_PREFIX + "/"):
        return path[len(OFFLINE_PREFIX) :] or "/", True
    return path, False


def class_from_headers(headers: Iterable[tuple[bytes, bytes]]) -> ServiceClass | None:
    """The class that the headers (lower-case names, as ASGI gives them) ask for, or None.

    Raises:
        ValueError: `x-sgl-conserve-class` has a value that is no class.
    """
    asked = None
    for name, value in headers:
        if name == _CLASS_HEADER:
            return _class_named(value.decode("latin-1").strip().lower())
        if name == _GATEWAY_HEADER and value.strip().lower() == b"bulk":
            asked = ServiceClass.OFFLINE
    return asked


def _class_named(name: str) -> ServiceClass:
    try:
        return ServiceClass(name)
    except ValueError:
        raise ValueError(f"must be online or offline, not {name!r}") from None


def class_from_body(body: bytes) -> ServiceClass | None:
    """The class that a JSON body's `service_tier` asks for, or None.

    A body that is no JSON object asks for nothing: refusing it is the route's business.
    """
    if b'"service_tier"' not in body:
        return None
    try:
        tier = _decoder.decode(body).service_tier
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return _TIERS.get(tier) if isinstance(tier, str) else None
