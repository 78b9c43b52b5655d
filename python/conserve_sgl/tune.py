"""`conserve tune`: look at the settings of servers that run, and change them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from conserve_sgl.errors import ServerError

__all__ = ["tune"]

_TIMEOUT_S = 30.0  # a scheduler answers between two steps


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
        console: gets the table.

    Raises:
        ServerError: a server does not answer, refuses, or runs without conserve. Those before it
            are changed.
    """
    table = Table("server", "offline", "waiting", "running", "ttft", "tpot", "yield_ms")
    try:
        for url in endpoints:
            with httpx.Client(base_url=url, timeout=_TIMEOUT_S) as http:
                if numbers:
                    _change(http, numbers, admin_api_key or api_key)
                table.add_row(url, *_cells(_state(http, api_key)))
    finally:
        if table.row_count:
            console.print(table)


def _change(http: httpx.Client, numbers: Mapping[str, float], key: str | None) -> None:
    body = {"server_args": dict(numbers)}
    updated = _ask(http, "POST", "/set_internal_state", key, json=body)
    if not isinstance(updated, list) or not all(updated):
        raise ServerError(f"{http.base_url}: not changed; the server's log says why")


def _state(http: httpx.Client, key: str | None) -> Mapping[str, Any]:
    info = _ask(http, "GET", "/server_info", key)
    try:
        return info["internal_states"][0]["conserve"]
    except (KeyError, IndexError, TypeError) as e:
        raise ServerError(f"{http.base_url}: no conserve in this server") from e


def _ask(http: httpx.Client, method: str, path: str, key: str | None, **kwargs: Any) -> Any:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        response = http.request(method, path, headers=headers, **kwargs)
        response.raise_for_status()
        return response.json()
    except httpx.HTTPStatusError as e:
        text = f"{e.response.status_code} {e.response.reason_phrase}"
        is_closed = e.response.status_code in (401, 403)
        hint = "; give --api-key or --admin-api-key" if is_closed else ""
        raise ServerError(f"{http.base_url}: {method} {path} was answered {text}{hint}") from e
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as e:
        raise ServerError(f"{http.base_url}: {method} {path}: {e}") from e


def _cells(state: Mapping[str, Any]) -> list[str]:
    slo = state["slo"]
    return [
        "paused" if state["offline_paused"] else "runs",
        str(state["offline_waiting"]),
        str(state["offline_running"]),
        slo["ttft"],
        slo["tpot"],
        f"{slo['yield_ms']:g}",
    ]
