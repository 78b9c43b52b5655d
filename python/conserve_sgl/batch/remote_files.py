"""Files of `run-batch` that are elsewhere: fetched before a run, put there after it.

A URL may hold a signature or a password: what is shown of it is the part before them.
"""

from __future__ import annotations

import asyncio
import random
import re
import shutil
import stat
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import unquote, urlsplit

import aiohttp
from aiohttp import ClientResponse

from conserve_sgl.client.retry import Passing, Retry, backoff_s
from conserve_sgl.errors import InputError, JobError

__all__ = ["STDIN", "at_hand", "is_url", "local_copy", "put", "shown"]

STDIN = "-"
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
_ATTEMPTS = 4


class _Refused(Exception):
    """The other side does not give or take the file; `passing` if it may do so later."""

    def __init__(self, reason: str, *, passing: bool) -> None:
        super().__init__(reason)
        self.passing = passing


def is_url(place: str) -> bool:
    """Whether `place` is an http(s) URL and not a path."""
    return place.lower().startswith(("http://", "https://"))


def shown(place: str) -> str:
    """`place` as it may stand in a message or a log."""
    if not is_url(place):
        return "standard input" if place == STDIN else place
    try:
        parts = urlsplit(place)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return place.partition("?")[0].rpartition("@")[2]
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"


def local_copy(place: str) -> Path:
    """The path of `place`; for a URL one of its name in the current folder."""
    return Path(_name(place)) if is_url(place) else Path(place)


@contextmanager
def at_hand(place: str, retry: Retry) -> Iterator[Path]:
    """A path under which the input at `place` can be read as often as one likes.

    What is elsewhere (a URL) or passes by (a pipe, STDIN) is copied to a temporary folder.

    Raises:
        InputError: there is nothing, or it cannot be read.
    """
    path = Path(place)
    is_file = place != STDIN and not is_url(place) and not _passes_by(path)
    if is_file:
        yield path
        return
    with TemporaryDirectory(prefix="conserve-run-batch-") as folder:
        copy = Path(folder) / _name(place)
        try:
            if is_url(place):
                asyncio.run(_patiently(retry, lambda: _fetch(place, copy)))
            else:
                _copy(place, copy)
        except _Refused as e:
            raise InputError(shown(place), f"cannot be read: {e}") from e
        except OSError as e:
            raise InputError(shown(place), f"cannot be read: {e.strerror or e}") from e
        yield copy


def put(path: Path, url: str, retry: Retry) -> None:
    """Store the file at `path` under `url`, by PUT.

    Raises:
        JobError: it was not taken; the file is as it was.
    """
    try:
        asyncio.run(_patiently(retry, lambda: _send(path, url)))
    except (_Refused, OSError) as e:
        raise JobError(
            f"{shown(url)} does not take the results: {e}. They are in {path}; run the same "
            "command again to try again"
        ) from e


def _name(place: str) -> str:
    if not is_url(place):
        return "standard-input" if place == STDIN else Path(place).name
    host_and_path = re.split("[?#]", place.partition("//")[2])[0]
    name = unquote(host_and_path.partition("/")[2].rpartition("/")[2])
    is_plain = name.strip(".") and "/" not in name and name.isprintable() and len(name) < 200
    return name if is_plain else "batch.jsonl"


def _passes_by(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return False  # whoever reads it says why not
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def _copy(place: str, to: Path) -> None:
    with to.open("wb") as copy:
        if place == STDIN:
            shutil.copyfileobj(sys.stdin.buffer, copy)
        else:
            with Path(place).open("rb") as source:
                shutil.copyfileobj(source, copy)


async def _patiently(retry: Retry, do: Callable[[], Awaitable[None]]) -> None:
    """Do it again when it may be that it works then."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            await do()
            return
        except _Refused as e:
            if not e.passing or attempt == _ATTEMPTS:
                raise
        await asyncio.sleep(backoff_s(retry, attempt, random.Random()))


async def _fetch(url: str, to: Path) -> None:
    async with _exchange("GET", url) as response:
        with to.open("wb") as copy:
            async for part in response.content.iter_chunked(1 << 20):
                copy.write(part)


async def _send(path: Path, url: str) -> None:
    with path.open("rb") as file:
        # A redirect would be followed with what is left of the file.
        async with _exchange("PUT", url, data=file, allow_redirects=False):
            pass


@asynccontextmanager
async def _exchange(method: str, url: str, **options: Any) -> AsyncIterator[ClientResponse]:
    """An answer with a status of success."""
    try:
        async with (
            aiohttp.ClientSession(timeout=_TIMEOUT) as session,
            session.request(method, url, **options) as response,
        ):
            if not 200 <= response.status < 300:
                may_pass = Passing.of(response.status) is not None
                raise _Refused(f"{response.status} {response.reason}", passing=may_pass)
            yield response
    except (aiohttp.ClientResponseError, ValueError) as e:  # their texts have the whole URL
        raise _Refused(f"{type(e).__name__}", passing=False) from e
    except (aiohttp.ClientError, TimeoutError) as e:
        raise _Refused(str(e) or type(e).__name__, passing=True) from e
