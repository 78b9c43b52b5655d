"""HTTP to one or several SGLang servers, as offline work, with retries.

Every request carries the header `x-sgl-conserve-class: offline` and the name of its job, and the
time that is left when the job has a deadline. What fails is one of:

| what happens                        | what is done                                               |
|-------------------------------------|------------------------------------------------------------|
| 429, 503                            | wait (Retry-After, or back off) and retry, without limit   |
| connection refused, host not found  | bench the endpoint; the job ends when no endpoint answered |
|                                     | for `server_down_s`                                        |
| 408, 500, 502, 504, connection lost | back off and retry, `max_attempts` times per line          |
| 401                                 | the job ends: no other line would fare better              |
| 404, 405 to a path that is not there| the line has failed with `NoSuchPath`                      |
| any other status                    | the line has failed                                        |
"""

from __future__ import annotations

import asyncio
import random
import re
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import Any, Protocol, TypeVar

import aiohttp
import msgspec

from conserve_sgl.errors import JobError
from conserve_sgl.jobs.schema import Job, Retry

__all__ = [
    "Attempts",
    "BadReply",
    "Client",
    "Clock",
    "Endpoint",
    "LineFailed",
    "NoSuchPath",
    "Stopped",
    "Target",
]

T = TypeVar("T")

OFFLINE_HEADERS = {"x-sgl-conserve-class": "offline"}
JOB_HEADER = "x-sgl-conserve-job"
DEADLINE_HEADER = "x-sgl-conserve-deadline-s"
JOB_NAME_CHARACTERS = 128
CONNECT_TIMEOUT_S = 10.0
_BUSY = {429, 503}
_FLAKY = {408, 500, 502, 504}
_CLOSED = 401
_NO_PATH = {404, 405}


class Clock:
    """Time and sleep of this process; tests bring their own."""

    def monotonic_s(self) -> float:
        """Seconds that only go forward."""
        return time.monotonic()

    def wall_s(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def deadline_s(self, job: Job) -> float | None:
        """When a run of `job` that starts now should be done; None where it does not say."""
        return None if job.deadline_s is None else self.monotonic_s() + job.deadline_s

    async def sleep(self, seconds: float) -> None:
        """Let `seconds` pass."""
        await asyncio.sleep(seconds)


class LineFailed(Exception):
    """This line cannot be answered; the job goes on. `status` is None without an HTTP reply.

    `body` is the reply's, where its status was what failed the line.
    """

    def __init__(self, status: int | None, reason: str, body: bytes | None = None) -> None:
        super().__init__(reason)
        self.status = status
        self.body = body


class NoSuchPath(LineFailed):
    """The endpoint has no such `path`, whatever the line: every other one that goes there fails."""

    def __init__(self, status: int, reason: str, body: bytes, path: str) -> None:
        super().__init__(status, reason, body)
        self.path = path


class Stopped(Exception):
    """The run is being stopped and this line had nothing in flight."""


class BadReply(Exception):
    """A reply with status 200 that does not answer the request; it may be better next time."""


class _Kind(Enum):
    BUSY = "busy"
    REFUSED = "refused"
    FLAKY = "flaky"
    REJECTED = "rejected"


class _Fault(Exception):
    def __init__(
        self,
        kind: _Kind,
        reason: str,
        status: int | None = None,
        retry_after_s: float | None = None,
        body: bytes | None = None,
    ) -> None:
        super().__init__(reason)
        self.kind, self.status, self.retry_after_s = kind, status, retry_after_s
        self.body = body


@dataclass
class Attempts:
    """How often the requests of one line were sent; `lost` of them count towards the limit."""

    sent: int = 0
    busy: int = 0
    lost: int = 0


@dataclass
class Endpoint:
    """One server, as this client sees it. `in_flight` includes requests that wait to be retried."""

    url: str
    in_flight: int = 0
    refusals: int = 0
    benched_until_s: float = 0.0
    identified: bool = False
    paths: dict[str, bool] = field(default_factory=dict)  # whether they are there, once known
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def forget(self) -> None:
        """Ask anew what it serves."""
        self.identified = False
        self.paths.clear()


def backoff_s(retry: Retry, failures: int, rng: random.Random) -> float:
    """Seconds to wait after the `failures`-th failure (from 1): doubling, capped, half jittered."""
    delay = min(retry.max_delay_s, retry.first_delay_s * 2 ** min(failures - 1, 60))
    return delay * rng.uniform(0.5, 1.0)


def retry_after_s(value: str | None, wall_s: float) -> float | None:
    """The seconds that a Retry-After header asks for (a number or an HTTP date), or None."""
    if value is None:
        return None
    if re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", value):
        return max(0.0, float(value))
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - wall_s)
    except ValueError:
        return None


class Target(Protocol):
    """Where to send, and how long to keep at it; a `Job` is one."""

    @property
    def endpoints(self) -> list[str]:
        """Base URLs."""

    @property
    def retry(self) -> Retry:
        """What to do when a request fails."""

    @property
    def request_timeout_s(self) -> float | None:
        """When to give a request up."""


class Client:
    """Posts JSON to the least loaded endpoint until it is answered; an async context manager.

    Args:
        target: endpoints, retry policy, timeout.
        name: the job's, as servers are told it.
        deadline_s: when the job should be done, on `clock`; `Clock.deadline_s` tells.
        api_key: bearer token, or None.
        identify: called with the model that an endpoint says it serves, when it is first used
            and again after it was away; may raise JobError.
        note: called with one line about each wait, and None when something was answered.
        stopping: once set, waits end with `Stopped`; what is in flight goes on.
    """

    def __init__(
        self,
        target: Target,
        *,
        name: str,
        deadline_s: float | None,
        api_key: str | None,
        identify: Callable[[str], None],
        note: Callable[[str | None], None],
        stopping: asyncio.Event,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self.endpoints = [Endpoint(url.rstrip("/")) for url in target.endpoints]
        self._retry = target.retry
        self._identify_model = identify
        self._note = note
        self._stopping = stopping
        self._clock = clock
        self._rng = rng
        self._last_answer_s = clock.monotonic_s()
        self._deadline_s = deadline_s
        headers = OFFLINE_HEADERS | _job_header(name)
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, socket_factory=_kept_alive_socket),
            headers=headers,
            timeout=aiohttp.ClientTimeout(
                total=target.request_timeout_s, sock_connect=CONNECT_TIMEOUT_S
            ),
            json_serialize=lambda value: msgspec.json.encode(value).decode(),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def post(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[bytes], T],
        attempts: Attempts,
        near: Endpoint | None = None,
    ) -> tuple[T, Endpoint]:
        """The reply to the JSON `body`, and the endpoint that gave it.

        Args:
            path: such as "/generate".
            read: decodes a reply with status 200; raises BadReply or a msgspec error.
            attempts: counts on, over all posts of one line.
            near: the endpoint to prefer, because its cache has the prefix.

        Raises:
            LineFailed: the line is refused, or was lost `max_attempts` times.
            Stopped: the run is being stopped.
            JobError: no line can be answered.
        """
        while True:
            endpoint = await self._pick(near)
            endpoint.in_flight += 1
            try:
                return await self._send(endpoint, path, body, read, attempts), endpoint
            except _Fault as fault:
                near = None
                await self._recover(endpoint, attempts, fault)
            finally:
                endpoint.in_flight -= 1

    async def get(self, path: str) -> Any | None:
        """What an endpoint answers to GET `path`: JSON or text, None if it has no such path for us.

        Tried again like `post`, over all endpoints.

        Raises:
            Stopped: the run is being stopped.
            JobError: no endpoint answers, or it does not let us in.
        """
        attempts = Attempts()
        while True:
            endpoint = await self._pick(None)
            try:
                status, raw = await self._exchange(endpoint, "GET", path, None)
            except _Fault as fault:
                try:
                    await self._recover(endpoint, attempts, fault)
                except LineFailed as e:
                    raise JobError(f"{endpoint.url}{path}: {e}") from e
                continue
            if status == _CLOSED:
                raise _closed(endpoint, path, raw)
            return _decoded(raw) if status == 200 else None

    async def _pick(self, near: Endpoint | None) -> Endpoint:
        while True:
            if self._stopping.is_set():
                raise Stopped
            now_s = self._clock.monotonic_s()
            up = [e for e in self.endpoints if e.benched_until_s <= now_s]
            if near in up:
                return near
            if up:
                return min(up, key=lambda e: e.in_flight)
            if now_s - self._last_answer_s >= self._retry.server_down_s:
                urls = ", ".join(e.url for e in self.endpoints)
                raise JobError(
                    f"no answer from {urls} for {self._retry.server_down_s:g} s. Finished lines "
                    "are kept; run the same command again to go on"
                )
            await self._pause(min(e.benched_until_s for e in self.endpoints) - now_s)

    async def _send(
        self,
        endpoint: Endpoint,
        path: str,
        body: dict[str, Any],
        read: Callable[[bytes], T],
        attempts: Attempts,
    ) -> T:
        if not endpoint.identified:
            async with endpoint.lock:
                await self._identify(endpoint)
        attempts.sent += 1
        status, raw = await self._exchange(endpoint, "POST", path, body)
        if status == _CLOSED:
            raise _closed(endpoint, path, raw)
        if status in _NO_PATH and not await self._has_path(endpoint, path, status):
            reason = f"{endpoint.url} has no {path}: {_message(raw)}"
            raise NoSuchPath(status, reason, raw, path)
        if status != 200:
            raise _Fault(_Kind.REJECTED, _message(raw), status, body=raw)
        endpoint.paths[path] = True
        try:
            return read(raw)
        except (BadReply, msgspec.MsgspecError, UnicodeDecodeError) as e:
            raise _Fault(_Kind.FLAKY, f"unexpected reply: {e}", status) from e

    async def _has_path(self, endpoint: Endpoint, path: str, status: int) -> bool:
        """Whether `path`, which answered `status`, takes a POST: 404 may be about a line's model.

        A GET finds out: a route for POST alone answers 405 to it, and has nothing to do.
        """
        if path not in endpoint.paths:
            if status == 404:
                status, _ = await self._exchange(endpoint, "GET", path, None)
                endpoint.paths[path] = status != 404
            else:
                endpoint.paths[path] = False
        return endpoint.paths[path]

    async def _identify(self, endpoint: Endpoint) -> None:
        if endpoint.identified:
            return
        status, raw = await self._exchange(endpoint, "GET", "/model_info", None)
        if status == _CLOSED:
            raise _closed(endpoint, "/model_info", raw)
        reply = _decoded(raw)
        if status == 200 and isinstance(reply, dict) and reply.get("model_path"):
            self._identify_model(str(reply["model_path"]))
        endpoint.identified = True  # a gateway without this route is asked no more

    async def _exchange(
        self, endpoint: Endpoint, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[int, bytes]:
        """Status and body of a reply whose status is not worth a retry."""
        try:
            async with self._session.request(
                method, endpoint.url + path, json=body, headers=self._time_left()
            ) as response:
                status, raw = response.status, await response.read()
                wait_s = retry_after_s(response.headers.get("Retry-After"), self._clock.wall_s())
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as e:
            raise _Fault(_Kind.REFUSED, _why(e)) from e
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise _Fault(_Kind.FLAKY, _why(e)) from e
        self._last_answer_s = self._now_s()
        endpoint.refusals = 0
        if status in _BUSY:
            raise _Fault(_Kind.BUSY, _message(raw), status, wait_s)
        if status in _FLAKY:
            raise _Fault(_Kind.FLAKY, _message(raw), status, body=raw)
        self._note(None)
        return status, raw

    def _time_left(self) -> dict[str, str]:
        if self._deadline_s is None:
            return {}
        return {DEADLINE_HEADER: f"{self._deadline_s - self._now_s():.3f}"}

    async def _recover(self, endpoint: Endpoint, attempts: Attempts, fault: _Fault) -> None:
        """Wait as the fault asks for, or raise what ends the line."""
        what = f"{endpoint.url}: {f'{fault.status} ' if fault.status else ''}{fault}"
        if fault.kind is _Kind.REJECTED:
            raise LineFailed(fault.status, str(fault), fault.body) from fault
        if fault.kind is _Kind.REFUSED:
            self._bench(endpoint)
            self._note(f"{what}; next try in {endpoint.benched_until_s - self._now_s():.0f} s")
            return
        if fault.kind is _Kind.BUSY:
            attempts.busy += 1
            wait_s = fault.retry_after_s
            if wait_s is None:
                wait_s = backoff_s(self._retry, attempts.busy, self._rng)
        else:
            attempts.lost += 1
            endpoint.forget()  # it may come back as another server
            if attempts.lost >= self._retry.max_attempts:
                reason = f"{fault} (lost {attempts.lost} times)"
                raise LineFailed(fault.status, reason, fault.body) from fault
            wait_s = backoff_s(self._retry, attempts.lost, self._rng)
        self._note(f"{what}; retry in {wait_s:.1f} s")
        await self._pause(wait_s)

    def _bench(self, endpoint: Endpoint) -> None:
        endpoint.forget()
        if endpoint.benched_until_s > self._now_s():
            return  # all in flight see the same refusal: it counts once
        endpoint.refusals += 1
        wait_s = backoff_s(self._retry, endpoint.refusals, self._rng)
        endpoint.benched_until_s = self._now_s() + wait_s

    def _now_s(self) -> float:
        return self._clock.monotonic_s()

    async def _pause(self, seconds: float) -> None:
        await first_of(self._clock.sleep(seconds), self._stopping.wait())
        if self._stopping.is_set():
            raise Stopped


async def first_of(*awaitables: Awaitable[Any]) -> None:
    """Wait until one of them is done, and cancel the others."""
    tasks = [asyncio.ensure_future(a) for a in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _job_header(name: str) -> dict[str, str]:
    # A file's name may hold anything but a slash; a header and the server take less.
    sent = "".join(c for c in name if c.isprintable())[:JOB_NAME_CHARACTERS].strip()
    return {JOB_HEADER: sent} if sent else {}


def _kept_alive_socket(address: tuple) -> socket.socket:
    # Without a read timeout only the kernel can tell a server that thinks for an hour from a
    # host that lost its power: after about two minutes of silence it reports the latter.
    family, kind, protocol, *_ = address
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    return sock


def _closed(endpoint: Endpoint, path: str, raw: bytes) -> JobError:
    return JobError(
        f"{endpoint.url}{path}: {_CLOSED} {_message(raw)}: it wants another API key "
        "(api_key_env, --api-key)"
    )


def _why(e: BaseException) -> str:
    return str(e) or type(e).__name__


def _decoded(raw: bytes) -> Any:
    try:
        return msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return raw.decode(errors="replace")


def _message(raw: bytes) -> str:
    """What an error reply says: SGLang's and OpenAI's shapes, or its text; 500 characters."""
    reply = _decoded(raw)
    while isinstance(reply, dict):
        inner = next((reply[k] for k in ("error", "message", "detail") if reply.get(k)), None)
        reply = msgspec.json.encode(reply).decode() if inner is None else inner
    return str(reply).strip()[:500] or "no reason given"
