"""HTTP to one or several SGLang servers, as offline work, with retries.

Every request carries the header `x-sgl-conserve-class: offline` and the name of its job, and the
time that is left when the job has a deadline. What fails is one of:

| what happens                        | what is done                                               |
|-------------------------------------|------------------------------------------------------------|
| 429, 503                            | leave the endpoint alone and retry, there or elsewhere,    |
|                                     | without limit (`retry.py`, `endpoints.py`)                 |
| 408, 500, 502, 504, connection lost | back off and retry, `max_attempts` times per line          |
| connection refused, host not found  | bench the endpoint; the job ends when no endpoint answered |
|                                     | for `server_down_s` (`endpoints.py`)                       |
| 401                                 | the job ends: no other line would fare better; where the   |
|                                     | client is patient, bench the endpoint                      |
| 404, 405 to a path that is not there| the line has failed with `NoSuchPath`                      |
| any other status                    | the line has failed                                        |
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Protocol, TypeVar

import aiohttp
import msgspec

from conserve_sgl.client.clock import Clock
from conserve_sgl.client.discovery import healthy_workers
from conserve_sgl.client.endpoints import Endpoint, Endpoints
from conserve_sgl.client.headers import deadline_header, key_header, offline_headers, spare_of
from conserve_sgl.client.interrupt import pause
from conserve_sgl.client.retry import Attempts, Passing, Retry, RetryRule
from conserve_sgl.errors import JobError

__all__ = ["BadReply", "Client", "LineFailed", "NoSuchPath", "Sending", "Target"]

T = TypeVar("T")
Sending = Callable[[Endpoint], AbstractAsyncContextManager[None]]
"""What a line is sent within, once it is known where it goes: called and entered anew each time."""

CONNECT_TIMEOUT_S = 10.0
IDLE_S = 2.0
"""How long a connection is kept for the next request. SGLang closes one after 5 s: what is sent on
it just then is lost."""
REDISCOVER_S = 5.0
_CLOSED = 401
_NO_PATH = {404, 405}


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


class BadReply(Exception):
    """A reply with status 200 that does not answer the request; it may be better next time."""


class _Fault(Exception):
    """No answer this time, or, where `why` is None, no connection.

    `status`, `retry_after` and `body` are of the reply, if there was one.
    """

    def __init__(
        self,
        why: Passing | None,
        reason: str,
        status: int | None = None,
        retry_after: str | None = None,
        body: bytes | None = None,
    ) -> None:
        super().__init__(reason)
        self.why, self.status, self.retry_after, self.body = why, status, retry_after, body


class Target(Protocol):
    """Where to send, and how long to keep at it; a `Job` is one."""

    @property
    def endpoints(self) -> list[str]:
        """Base URLs; none where they are to be discovered."""

    @property
    def discover(self) -> str | None:
        """Base URL of a gateway whose workers are the endpoints, or None."""

    @property
    def max_in_flight(self) -> int:
        """Requests at a time, at all of them together."""

    @property
    def retry(self) -> Retry:
        """What to do when a request fails."""

    @property
    def request_timeout_s(self) -> float | None:
        """When to give a request up."""


class Client:
    """Posts JSON to the endpoint that has most room until it is answered; an async context manager,
    which finds the endpoints first where there is a gateway to ask, and keeps up with it.

    Args:
        target: endpoints or a gateway, retry policy, timeout.
        name: the job's, as servers are told it.
        deadline_s: when the job should be done, on `clock`; `Clock.deadline_s` tells.
        api_key: bearer token, or None.
        identify: called with the model that an endpoint says it serves, when it is first used
            and again after it was away; may raise JobError.
        note: called with one line about each wait, and None when something was answered.
        stopping: once set, waits end with `Stopped`; what is in flight goes on.
        own_path: a path that only this very process answers, where the client is part of a server;
            `Endpoint.is_own` says which endpoint did.
        patient: raise no JobError. A gateway that is not there, or has no workers, is waited for,
            and a server that wants another key is left alone like one that is not there.
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
        own_path: str | None = None,
        patient: bool = False,
    ) -> None:
        self._rule = RetryRule(target.retry, clock=clock, rng=rng)
        self._endpoints = Endpoints(
            target.endpoints,
            target.retry,
            self._rule,
            most=target.max_in_flight,
            stopping=stopping,
            clock=clock,
        )
        self._identify_model = identify
        self._note = note
        self._stopping = stopping
        self._clock = clock
        self._deadline_s = deadline_s
        self._own_path = own_path
        self._patient = patient
        self._gateway = target.discover
        self._follows: asyncio.Task[None] | None = None
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=IDLE_S, socket_factory=_kept_alive_socket
            ),
            headers=offline_headers(name) | key_header(api_key),
            timeout=aiohttp.ClientTimeout(
                total=target.request_timeout_s, sock_connect=CONNECT_TIMEOUT_S
            ),
            json_serialize=lambda value: msgspec.json.encode(value).decode(),
        )

    @property
    def endpoints(self) -> list[Endpoint]:
        """The servers, in the order of the target."""
        return self._endpoints.all

    async def __aenter__(self) -> Client:
        """Raises JobError where the gateway does not say who its workers are, or has none, unless
        the client is patient."""
        if self._gateway is not None:
            try:
                if not self._patient:
                    await self._discover(self._gateway)
            except BaseException:
                await self._session.close()
                raise
            self._follows = asyncio.create_task(self._keep_up_with(self._gateway))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._follows is not None:
            self._follows.cancel()
        await self._session.close()

    def home(self, beginning: bytes) -> Endpoint | None:
        """The endpoint that prompts which begin so should share; see `Endpoints.home`."""
        return self._endpoints.home(beginning)

    async def _discover(self, gateway: str) -> None:
        self._endpoints.use(await healthy_workers(self._session, gateway))

    async def _keep_up_with(self, gateway: str) -> None:
        """While the gateway is away, who was there last stays."""
        while True:
            try:
                await self._discover(gateway)
            except JobError as e:
                self._note(str(e))
            await self._clock.sleep(REDISCOVER_S)

    async def post(
        self,
        path: str,
        body: dict[str, Any],
        read: Callable[[bytes], T],
        attempts: Attempts,
        near: Endpoint | None = None,
        sending: Sending = nullcontext,
    ) -> tuple[T, Endpoint]:
        """The reply to the JSON `body`, and the endpoint that gave it.

        Args:
            path: such as "/generate".
            read: decodes a reply with status 200; raises BadReply or a msgspec error.
            attempts: counts on, over all posts of one line.
            near: the endpoint to prefer, because its cache has the prefix.
            sending: entered around every time that it is sent; may wait, and may raise.

        Raises:
            LineFailed: the line is refused, or was lost `max_attempts` times.
            Stopped: the run is being stopped.
            JobError: no line can be answered.
        """
        while True:
            endpoint = await self._endpoints.pick(near)
            try:
                return await self._send(endpoint, path, body, read, attempts, sending), endpoint
            except _Fault as fault:
                near = None
                await self._recover(endpoint, attempts, fault)
            finally:
                self._endpoints.leave(endpoint)

    async def get(self, path: str) -> Any | None:
        """What an endpoint answers to GET `path`: JSON or text, None if it has no such path for us.

        Tried again like `post`, over all endpoints.

        Raises:
            Stopped: the run is being stopped.
            JobError: no endpoint answers, or it does not let us in.
        """
        attempts = Attempts()
        while True:
            endpoint = await self._endpoints.pick()
            try:
                status, raw = await self._exchange(endpoint, "GET", path, None)
            except _Fault as fault:
                try:
                    await self._recover(endpoint, attempts, fault)
                except LineFailed as e:
                    raise JobError(f"{endpoint.url}{path}: {e}") from e
                continue
            finally:
                self._endpoints.leave(endpoint)
            if status == _CLOSED:
                raise _closed(endpoint, path, raw)
            return _decoded(raw) if status == 200 else None

    async def _send(
        self,
        endpoint: Endpoint,
        path: str,
        body: dict[str, Any],
        read: Callable[[bytes], T],
        attempts: Attempts,
        sending: Sending,
    ) -> T:
        if not endpoint.identified:
            async with endpoint.lock:
                await self._identify(endpoint)
        async with sending(endpoint):
            attempts.sent += 1
            status, raw = await self._exchange(endpoint, "POST", path, body)
        if status == _CLOSED:
            raise self._shut(endpoint, path, raw)
        if status in _NO_PATH and not await self._has_path(endpoint, path, status):
            reason = f"{endpoint.url} has no {path}: {_message(raw)}"
            raise NoSuchPath(status, reason, raw, path)
        if status != 200:
            raise LineFailed(status, _message(raw), raw)
        endpoint.paths[path] = True
        try:
            return read(raw)
        except (BadReply, msgspec.MsgspecError, UnicodeDecodeError) as e:
            raise _Fault(Passing.LOST, f"unexpected reply: {e}", status) from e

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
            raise self._shut(endpoint, "/model_info", raw)
        reply = _decoded(raw)
        if status == 200 and isinstance(reply, dict) and reply.get("model_path"):
            self._identify_model(str(reply["model_path"]))
        if self._own_path is not None:
            status, _ = await self._exchange(endpoint, "GET", self._own_path, None)
            endpoint.is_own = status == 200
        endpoint.identified = True  # a gateway without this route is asked no more

    def _shut(self, endpoint: Endpoint, path: str, raw: bytes) -> Exception:
        """What to raise where `endpoint` does not let us in."""
        closed = _closed(endpoint, path, raw)
        return _Fault(None, str(closed)) if self._patient else closed

    async def _exchange(
        self, endpoint: Endpoint, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[int, bytes]:
        """Status and body of a reply whose status is not worth a retry."""
        sent_s = self._endpoints.sent(endpoint)
        try:
            async with self._session.request(
                method, endpoint.url + path, json=body, headers=self._time_left()
            ) as response:
                status, raw = response.status, await response.read()
                retry_after = response.headers.get("Retry-After")
                spare = spare_of(response.headers)
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as e:
            raise _Fault(None, _why(e)) from e
        except (aiohttp.ClientError, TimeoutError, OSError) as e:
            raise _Fault(Passing.LOST, _why(e)) from e
        self._endpoints.answered(endpoint)
        if why := Passing.of(status):
            raise _Fault(why, _message(raw), status, retry_after, raw)
        if spare is not None:
            said_s = None if spare.after_s is None else sent_s + spare.after_s
            self._endpoints.served(endpoint, spare.requests, said_s)
        elif method == "POST":
            self._endpoints.served(endpoint, None)
        self._note(None)
        return status, raw

    def _time_left(self) -> dict[str, str]:
        if self._deadline_s is None:
            return {}
        return deadline_header(self._deadline_s - self._clock.monotonic_s())

    async def _recover(self, endpoint: Endpoint, attempts: Attempts, fault: _Fault) -> None:
        """Wait as the fault asks for. Raises LineFailed when the line was lost too often."""
        what = f"{endpoint.url}: {f'{fault.status} ' if fault.status else ''}{fault}"
        if fault.why is None:
            wait_s = self._endpoints.bench(endpoint)
            self._note(f"{what}; next try in {wait_s:.0f} s")
            return
        if fault.why is Passing.LOST:
            endpoint.forget()  # it may come back as another server
        wait_s = self._rule.wait_s(fault.why, attempts, fault.retry_after)
        if wait_s is None:
            reason = f"{fault} (lost {attempts.lost} times)"
            raise LineFailed(fault.status, reason, fault.body) from fault
        self._note(f"{what}; retry in {wait_s:.1f} s")
        if fault.why is Passing.BUSY:
            self._endpoints.refused(endpoint, wait_s)  # another one may take it meanwhile
            return
        await pause(wait_s, self._stopping, self._clock)


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
