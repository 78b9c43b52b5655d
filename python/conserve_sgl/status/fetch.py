"""Asks servers for their record, from outside."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import aiohttp
import msgspec

from conserve_sgl.client.control import RefusedError, ask
from conserve_sgl.errors import ServerError
from conserve_sgl.status.ask import Ask
from conserve_sgl.status.record import VERSION, Snapshot

__all__ = ["Seen", "look", "look_at_all"]

_TIMEOUT = aiohttp.ClientTimeout(total=10)  # a scheduler answers between two steps


class Seen(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one look at a server gave. A line of a recording, too.

    Args:
        endpoint: its base URL.
        at_s: when it was looked at, by the clock of whoever looked.
        snapshot: what it said, or None.
        is: what it is where it said nothing: `down`, or `stock`, an SGLang without conserve.
        fault: why, for people.
        lost_steps: in a recording, steps between those of the record before and these.
    """

    endpoint: str
    at_s: float
    snapshot: Snapshot | None = None
    is_: Literal["down", "stock"] | None = msgspec.field(default=None, name="is")
    fault: str | None = None
    lost_steps: int = 0


async def look_at_all(
    endpoints: Sequence[str], asks: Mapping[str, Ask], *, api_key: str | None
) -> list[Seen]:
    """Look at every server at the same time, and never fail.

    Args:
        endpoints: base URLs.
        asks: which steps to ask for, by base URL; none of the others.
        api_key: as the servers' own, or None.
    """
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        looks = (look(session, url, asks.get(url, Ask()), api_key) for url in endpoints)
        return list(await asyncio.gather(*looks))


async def look(session: aiohttp.ClientSession, url: str, which: Ask, key: str | None) -> Seen:
    """Look at the server at `url`, and never fail."""
    base = url.rstrip("/")
    try:
        snapshot = await _snapshot(session, base, which, key)
    except ServerError as e:
        return Seen(endpoint=url, at_s=time.time(), is_="down", fault=str(e))
    if snapshot is None:
        fault = "an SGLang server without conserve, or with an older one"
        return Seen(endpoint=url, at_s=time.time(), is_="stock", fault=fault)
    return Seen(endpoint=url, at_s=time.time(), snapshot=snapshot)


async def _snapshot(
    session: aiohttp.ClientSession, base: str, which: Ask, key: str | None
) -> Snapshot | None:
    numbers = {"since": which.since, "steps": which.most}
    if which == Ask(since=None, most=None):
        numbers["since"] = 0
    query = {name: number for name, number in numbers.items() if number is not None}
    url = f"{base}/conserve/status"
    try:
        return _read(url, await ask(session, "GET", url, key, params=query))
    except RefusedError as e:
        if e.status != 404:
            raise
    # Without `status.enabled` there is no such route, and no steps; the record itself is here too.
    url = f"{base}/server_info"
    info = await ask(session, "GET", url, key)
    try:
        state = msgspec.json.decode(info, type=_Info).internal_states[0]
    except (msgspec.DecodeError, IndexError):
        return None
    record = state.get("conserve", {}).get("status")
    return None if record is None else _read(url, msgspec.json.encode(record))


class _Info(msgspec.Struct):
    internal_states: list[dict[str, Any]]


class _Versioned(msgspec.Struct):
    version: int


def _read(url: str, text: bytes) -> Snapshot:
    try:
        version = msgspec.json.decode(text, type=_Versioned).version
        if version != VERSION:
            raise ServerError(f"{url}: a record of version {version}; this one reads {VERSION}")
        return msgspec.json.decode(text, type=Snapshot)
    except msgspec.DecodeError as e:
        raise ServerError(f"{url}: no record: {e}") from e
