"""Load: online requests in an open loop, offline requests in a closed one.

An online request leaves when it is due, whatever became of those before it: a closed loop would
slow down with the server and hide the very delays that we measure. Offline work is a backlog, so
a fixed number of requests is kept in flight.

The client shares its cores with the engine, so online bodies are encoded ahead and of each
streamed chunk only the token counts are decoded.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec

from conserve_sgl.bench.load.prompts import TimedRequest
from conserve_sgl.bench.load.record import UNFINISHED, LoadResult, RequestRecord

__all__ = ["keep_in_flight", "replay"]

_PAUSE_AFTER_FAULT_S = 0.2


async def replay(
    base_url: str,
    requests: Sequence[TimedRequest],
    *,
    drain_s: float,
    class_: str = "online",
    start_s: float | None = None,
    on_done: Callable[[RequestRecord], None] = lambda _: None,
) -> LoadResult:
    """Send `requests` to `base_url`/generate at their arrival times; return when all have ended.

    Requests still running `drain_s` seconds after the last arrival are dropped (which aborts them
    in the server) and recorded as errors. Server faults are recorded, never raised. `on_done` is
    called as each request ends. `start_s` is when the stream begins, on the clock of
    `time.perf_counter`; now, when it is not given.
    """
    if start_s is None:
        start_s = time.perf_counter()
    async with _posting(base_url, {}) as post:
        started_unix_s = time.time() - time.perf_counter() + start_s
        calls = [_Call(post, r.body, class_, start_s, r.arrival.at_s) for r in requests]
        await _send_all(calls, start_s, drain_s, on_done)
    duration_s = time.perf_counter() - start_s
    return LoadResult(started_unix_s, duration_s, tuple(call.record() for call in calls))


async def keep_in_flight(
    base_url: str,
    bodies: Iterator[bytes],
    in_flight: int,
    stop: asyncio.Event,
    *,
    start_s: float,
    class_: str = "offline",
    headers: Mapping[str, str],
) -> tuple[RequestRecord, ...]:
    """Keep `in_flight` of the endless `bodies` running at `base_url`/generate until `stop` is set.

    Times are seconds after `start_s`, on the clock of `time.perf_counter`, and may be negative.
    What runs when `stop` is set is dropped; its record holds what it had got by then, and an
    error. After a fault a place stays empty for a moment, or a refusing server would be flooded.
    """
    calls: list[_Call] = []

    async def work(post: Callable[..., Any]) -> None:
        while True:
            due_s = time.perf_counter() - start_s
            call = _Call(post, next(bodies), class_, start_s, due_s)
            calls.append(call)
            await call.run()
            if call.error is not None:
                await asyncio.sleep(_PAUSE_AFTER_FAULT_S)

    async with _posting(base_url, headers) as post:
        tasks = [asyncio.create_task(work(post)) for _ in range(in_flight)]
        try:
            await stop.wait()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return tuple(call.record() for call in calls)


@asynccontextmanager
async def _posting(base_url: str, headers: Mapping[str, str]) -> AsyncIterator[Callable[..., Any]]:
    """A session's `post`, bound to `/generate`."""
    # Every request may hold a connection of its own: a pool limit would close the loop.
    # And none is kept for as long as SGLang keeps it, 5 s: what is sent just then is lost.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, read_bufsize=2**20
    ) as session:
        headers = {"Content-Type": "application/json", **headers}
        yield functools.partial(session.post, f"{base_url}/generate", headers=headers)


async def _send_all(
    calls: Sequence[_Call],
    start_s: float,
    drain_s: float,
    on_done: Callable[[RequestRecord], None],
) -> None:
    tasks: list[asyncio.Task[None]] = []
    try:
        for call in sorted(calls, key=lambda call: call.due_s):
            await asyncio.sleep(start_s + call.due_s - time.perf_counter())
            task = asyncio.create_task(call.run())
            task.add_done_callback(lambda _, call=call: on_done(call.record()))
            tasks.append(task)
        if tasks:
            await asyncio.wait(tasks, timeout=drain_s)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _MetaInfo(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: dict | None = None


class _Chunk(msgspec.Struct, frozen=True):
    meta_info: _MetaInfo = _MetaInfo()
    error: dict | str | None = None


_CHUNK = msgspec.json.Decoder(_Chunk)


class _Call:
    """One request on its way; `record()` is what is known of it so far."""

    def __init__(
        self, post: Callable[..., Any], body: bytes, class_: str, start_s: float, due_s: float
    ) -> None:
        self.post = post
        self.body = body
        self.class_ = class_
        self.due_s = due_s
        self.start_s = start_s
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.sent_s = self.due_s
        self.done_s: float | None = None
        self.chunk_times_s: list[float] = []
        self.chunk_tokens: list[int] = []
        self.tokens = 0
        self.error: str | None = UNFINISHED

    async def run(self) -> None:
        """Send the request and read its stream to the end; a fault becomes `error`."""
        self.sent_s = self._now_s()
        try:
            await self._exchange()
        except (aiohttp.ClientError, OSError, msgspec.DecodeError, ValueError) as e:
            self.error = f"{type(e).__name__}: {e}"

    async def _exchange(self) -> None:
        async with self.post(data=self.body) as response:
            if response.status != 200:
                self.error = f"HTTP {response.status}: {(await response.text())[:500]}"
                return
            async for line in response.content:
                if line.startswith(b"data: {"):
                    self._take(_CHUNK.decode(line[6:]))
            if self.error == UNFINISHED:
                self.error = "the stream ended before the answer did"

    def _take(self, chunk: _Chunk) -> None:
        if chunk.error is not None:
            self.done_s, self.error = None, msgspec.json.encode(chunk.error).decode()
            return
        now_s, meta = self._now_s(), chunk.meta_info
        if meta.completion_tokens > self.tokens:
            self.chunk_times_s.append(now_s)
            self.chunk_tokens.append(meta.completion_tokens - self.tokens)
            self.tokens = meta.completion_tokens
        self.prompt_tokens = meta.prompt_tokens or self.prompt_tokens
        self.cached_tokens = meta.cached_tokens
        if meta.finish_reason is not None:
            self._finish(meta.finish_reason, now_s)

    def _finish(self, reason: dict, now_s: float) -> None:
        if reason["type"] == "abort":
            self.error = f"aborted: {reason.get('message', '')}"
        else:
            self.done_s, self.error = now_s, None

    def _now_s(self) -> float:
        return time.perf_counter() - self.start_s

    def record(self) -> RequestRecord:
        return RequestRecord(
            class_=self.class_,
            due_s=self.due_s,
            sent_s=self.sent_s,
            done_s=self.done_s,
            chunk_times_s=tuple(self.chunk_times_s),
            chunk_tokens=tuple(self.chunk_tokens),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            error=self.error,
        )
