"""`conserve tune`: look at the settings of servers that run, and change them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import aiohttp
import msgspec
from rich.console import Console

from conserve_sgl.client.control import ask
from conserve_sgl.errors import ServerError

__all__ = ["change", "tune"]

_TIMEOUT = aiohttp.ClientTimeout(total=30)  # a scheduler answers between two steps


def tune(
    endpoints: Sequence[str],
    numbers: Mapping[str, float],
    *,
    api_key: str | None,
    admin_api_key: str | None,
    console: Console,
) -> None:
    """Change what `numbers` say (see `settings`) on each server in turn, and show what holds then.

    Args:
        endpoints: base URLs.
        numbers: what to change; empty only shows.
        api_key: as the servers' own `--api-key`.
        admin_api_key: as theirs, for servers that want it for a change; None is `api_key`.
        console: gets a line for each server, as soon as it is known, and where nothing is changed
            another one: what bounds offline work.

    Raises:
        ServerError: a server does not answer, refuses, or runs without conserve. Those before it
            are changed.
    """
    for url in endpoints:
        state = asyncio.run(_tune_one(url, numbers, api_key, admin_api_key))
        # No table: the address tells servers apart, and must not be cut.
        console.print(f"{url}: {_line(state)}", highlight=False, markup=False, soft_wrap=True)
        if not numbers and "status" in state:
            text = state["status"]["why"]["text"]
            console.print(f"  {text}", highlight=False, markup=False, soft_wrap=True)


def change(url: str, numbers: Mapping[str, float]) -> None:
    """Change what `numbers` say on a server without keys, and show nothing.

    Raises:
        ServerError: it does not answer, or refuses.
    """

    async def tell() -> None:
        async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
            await _Server(session, url).change(numbers, None)

    asyncio.run(tell())


async def _tune_one(
    url: str, numbers: Mapping[str, float], api_key: str | None, admin_api_key: str | None
) -> Mapping[str, Any]:
    async with aiohttp.ClientSession(timeout=_TIMEOUT) as session:
        server = _Server(session, url.rstrip("/"))
        if numbers:
            await server.change(numbers, admin_api_key or api_key)
        return await server.state(api_key)


class _Server:
    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def change(self, numbers: Mapping[str, float], key: str | None) -> None:
        body = {"server_args": dict(numbers)}
        updated = await self._ask("POST", "/set_internal_state", key, json=body)
        if not isinstance(updated, list) or not all(updated):
            raise ServerError(f"{self._url}: not changed; the server's log says why")

    async def state(self, key: str | None) -> Mapping[str, Any]:
        info = await self._ask("GET", "/server_info", key)
        try:
            return info["internal_states"][0]["conserve"]
        except (KeyError, IndexError, TypeError) as e:
            raise ServerError(f"{self._url}: no conserve in this server") from e

    async def _ask(self, method: str, path: str, key: str | None, **kwargs: Any) -> Any:
        url = f"{self._url}{path}"
        body = await ask(self._session, method, url, key, **kwargs)
        try:
            return msgspec.json.decode(body)
        except msgspec.DecodeError as e:
            raise ServerError(f"{url}: {e}") from e


def _line(state: Mapping[str, Any]) -> str:
    slo = state["slo"]
    offline = "paused" if state["offline_paused"] else "runs"
    batches = "held" if state.get("batches_held") else "run"
    waiting, running = state["offline_waiting"], state["offline_running"]
    starved = f", none for {state['offline_starved_s']:.0f} s because of {state['offline_bound']}"
    starved = starved if state["offline_starved_s"] >= 1 else ""
    return (
        f"offline {offline}, {waiting} waiting, {running} running{starved}; batches {batches}; "
        f"ttft {slo['ttft']}, tpot {slo['tpot']}, yield_ms {slo['yield_ms']:g}"
    )
