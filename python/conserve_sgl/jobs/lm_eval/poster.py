"""Sends the requests of an evaluation: bounded in flight, over all endpoints, as offline work."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

from rich.console import Console

from conserve_sgl.client.clock import Clock
from conserve_sgl.client.faults import Faults
from conserve_sgl.client.http import Client, LineFailed, NoSuchPath
from conserve_sgl.client.in_flight import send_all
from conserve_sgl.client.interrupt import Interrupt, Stopped
from conserve_sgl.client.progress import Meter, ProgressView
from conserve_sgl.client.retry import Attempts
from conserve_sgl.errors import JobError
from conserve_sgl.jobs.ask import TextReply, read_text
from conserve_sgl.jobs.schema import Job

__all__ = ["Poster"]

K = TypeVar("K")


class Poster:
    """Posts to `/generate` for one evaluation, in as many event loops as its caller runs.

    Attributes:
        requests, retries, prompt_tokens, completion_tokens: of all answers so far.

    Args:
        job: endpoints, how much at once, retry policy.
        name: the job's, as servers are told it.
        identify: called with the model that an endpoint says it serves; may raise JobError.
    """

    def __init__(
        self,
        job: Job,
        *,
        name: str,
        console: Console,
        api_key: str | None = None,
        identify: Callable[[str], None],
        clock: Clock | None = None,
        seed: int | None = None,
    ) -> None:
        self._job = job
        self._console = console
        self._api_key = api_key
        self._identify = identify
        self._clock = clock or Clock()
        self._name = name
        self._deadline_s = self._clock.deadline_s(job.deadline_s)
        self._rng = random.Random(seed)
        self._failures_in_a_row = 0
        self.requests = self.retries = self.prompt_tokens = self.completion_tokens = 0

    async def get(self, path: str) -> Any | None:
        """JSON or text from GET `path` of an endpoint, None if it has no such path.

        Raises:
            JobError: no endpoint answers.
        """

        def note(text: str | None) -> None:
            if text is not None:
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)

        async with self._client(asyncio.Event(), note) as client:
            return await client.get(path)

    async def post_all(
        self,
        name: str,
        total: int,
        bodies: Iterator[tuple[K, dict[str, Any]]],
        answered: Callable[[K, TextReply], None],
    ) -> None:
        """Post the `total` bodies in order; `answered` gets each one's key and reply as it comes.

        An `answered` that raises BadReply has its request sent again, like one that was lost.

        Raises:
            Stopped: interrupted; what had been answered was handed over.
            JobError: some requests failed, or none can be answered.
        """
        if total == 0:
            return
        meter = Meter(total, self._clock.monotonic_s())
        faults = Faults()
        self._failures_in_a_row = 0
        with ProgressView(self._console, name, meter) as view:
            interrupt = Interrupt(self._job.drain_s, view.say)
            async with self._client(interrupt.stopping, meter.noted) as client:
                await send_all(
                    bodies,
                    partial(self._post, client, answered, meter, faults),
                    in_flight=min(self._job.max_in_flight, total),
                    interrupt=interrupt,
                    ticker=view.keep_fresh(self._clock),
                )
        self.retries += meter.retries
        if meter.left:
            raise Stopped
        if faults.total:
            raise _failed(f"{faults.total} of {total} requests of {name} failed", faults)

    async def _post(
        self,
        client: Client,
        answered: Callable[[K, TextReply], None],
        meter: Meter,
        faults: Faults,
        asked: tuple[K, dict[str, Any]],
    ) -> None:
        key, body = asked
        read = partial(_read, answered, key)
        try:
            reply, _ = await client.post("/generate", body, read, Attempts())
        except LineFailed as failed:
            faults.add(f"{len(body['input_ids'])} tokens", failed.status, str(failed))
            meter.failed += 1
            if isinstance(failed, NoSuchPath):
                raise JobError(str(failed)) from failed
            self._failures_in_a_row += 1
            if self._failures_in_a_row >= self._job.retry.max_failures_in_a_row:
                what = f"{self._failures_in_a_row} requests failed in a row"
                raise _failed(what, faults) from failed
        else:
            self._failures_in_a_row = 0
            self._count(reply, meter)

    def _count(self, reply: TextReply, meter: Meter) -> None:
        prompt, completion = reply.meta_info.prompt_tokens, reply.meta_info.completion_tokens
        meter.count(prompt, completion)
        self.requests += 1
        self.prompt_tokens += prompt
        self.completion_tokens += completion

    def _client(self, stopping: asyncio.Event, note: Callable[[str | None], None]) -> Client:
        return Client(
            self._job,
            name=self._name,
            deadline_s=self._deadline_s,
            api_key=self._api_key,
            identify=self._identify,
            note=note,
            stopping=stopping,
            clock=self._clock,
            rng=self._rng,
        )


def _failed(what: str, faults: Faults) -> JobError:
    kinds = "; ".join(faults.lines())
    return JobError(
        f"{what}: {kinds}. Finished requests are kept; run the same command again to go on"
    )


def _read(answered: Callable[[K, TextReply], None], key: K, raw: bytes) -> TextReply:
    reply = read_text(raw)
    answered(key, reply)
    return reply
