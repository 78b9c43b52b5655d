"""One server for several systems in a row: which may share it, and what each leaves behind."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec

from conserve_sgl.bench.report.system import SystemConfig
from conserve_sgl.config import SloConfig
from conserve_sgl.errors import ServerError
from conserve_sgl.settings import slo_numbers
from conserve_sgl.tune import change

__all__ = ["SERVER_LOG", "STEPS", "ServerFiles", "empty_caches", "server_key", "turn_dial"]

SERVER_LOG, STEPS = "server.log", "steps.jsonl"

_DIAL = ("ttft", "tpot", "yield_ms")
"""Keys of the section `slo` that change while a server runs."""

_SETTLE_S = 60.0


def server_key(system: SystemConfig) -> Any:
    """Equal for systems that one server can be: they are started alike, but for the dial."""
    section = dict(system.conserve or {})
    slo = {key: value for key, value in section.pop("slo", {}).items() if key not in _DIAL}
    alike = (system.kind, system.flags, system.env, {**section, "slo": slo})
    return msgspec.json.encode(alike, order="deterministic")


def turn_dial(base_url: str, conserve: Mapping[str, Any]) -> None:
    """Give a server that runs the objectives of this configuration, by what `conserve tune` does.

    Raises:
        ServerError: it does not take them.
    """
    section = conserve.get("slo", {})
    slo = SloConfig(**{key: value for key, value in section.items() if key in _DIAL})
    change(base_url, slo_numbers(ttft=slo.ttft, tpot=slo.tpot, yield_ms=slo.yield_ms))


def empty_caches(base_url: str) -> None:
    """Wait until a server holds no request, and have it forget every prefix.

    Raises:
        ServerError: it does not come to rest.
    """
    try:
        answer = httpx.post(
            f"{base_url}/flush_cache", params={"timeout": _SETTLE_S}, timeout=_SETTLE_S + 10
        )
        answer.raise_for_status()
    except httpx.HTTPError as e:
        raise ServerError(f"{base_url} did not empty its caches: {e}") from e


class ServerFiles:
    """Log and step log of a server, which grow in the folder of its first system.

    Each further system gets what was written in its own time; at the end the first keeps its share.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._marks: dict[str, int] = dict.fromkeys((SERVER_LOG, STEPS), 0)
        self._first_share: Mapping[str, int] | None = None
        self._is_shared = False

    def share(self, folder: Path) -> None:
        """The system of `folder` is done: what was written since the last one's end is its own."""
        ends = {name: _size(self._folder / name) for name in self._marks}
        if self._first_share is None:
            self._first_share = ends
        else:
            self._is_shared = True
            for name, end in ends.items():
                _copy(self._folder / name, self._marks[name], end, folder / name)
        self._marks = ends

    def close(self) -> None:
        """The server has ended: what it wrote after its last system is nobody's."""
        if self._is_shared and self._first_share is not None:
            for name, end in self._first_share.items():
                if (path := self._folder / name).exists():
                    os.truncate(path, end)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _copy(source: Path, start: int, end: int, target: Path) -> None:
    if not source.exists():
        return
    with source.open("rb") as file:
        file.seek(start)
        target.write_bytes(file.read(end - start))
