"""The other servers that lines of batches go to, where the configuration names some.

Each open batch has a client of its own over all of them, as a run of `conserve run-batch` has: with
its name and its deadline, and windows that are its own.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from conserve_sgl.batch.server.open_batch import OpenBatch
from conserve_sgl.client.clock import Clock
from conserve_sgl.client.http import Client
from conserve_sgl.client.retry import Retry
from conserve_sgl.config import BatchConfig

__all__ = ["Fleet"]

logger = logging.getLogger(__name__)

_NOTE_EVERY_S = 60.0
_MOST_NOTES = 20
_NUMBER = re.compile(r"\d+")


class Fleet:
    """The servers of a configuration, this one among them or not; the `Target` of every client.

    Args:
        config: `batch` of the server's configuration.
        retry: its `server_down_s` ends no batch before the batch's own window should.
        api_key: this server's, which all are sent.
    """

    request_timeout_s = None

    def __init__(
        self,
        config: BatchConfig,
        retry: Retry,
        *,
        api_key: str | None,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self.endpoints = config.endpoints
        self.discover = config.discover
        self.max_in_flight = config.max_in_flight
        self.retry = retry
        self._api_key = api_key
        self._clock = clock
        self._rng = rng

    @asynccontextmanager
    async def reached_from(self, batch: OpenBatch) -> AsyncIterator[None]:
        """`batch.client` is there meanwhile, if there are servers to go to."""
        if not self.endpoints and self.discover is None:
            yield
            return
        client = Client(
            self,
            name=batch.batch_id,
            deadline_s=self._clock.deadline_s(batch.deadline_s - self._clock.wall_s()),
            api_key=self._api_key,
            identify=lambda _: None,
            note=_Notes(batch.batch_id, self._clock),
            stopping=batch.ended,
            clock=self._clock,
            rng=self._rng,
            # Its store is this process's alone, so no other server has this batch.
            own_path=f"/v1/batches/{batch.batch_id}",
            patient=True,
        )
        async with client:
            batch.client = client
            try:
                yield
            finally:
                batch.client = None


class _Notes:
    """Logs what a batch waits for: of notes that differ in numbers alone one in a while."""

    def __init__(self, batch_id: str, clock: Clock) -> None:
        self._batch_id = batch_id
        self._clock = clock
        self._since_s = clock.monotonic_s()
        self._said: set[str] = set()

    def __call__(self, note: str | None) -> None:
        if note is None:
            return
        now_s = self._clock.monotonic_s()
        if now_s - self._since_s >= _NOTE_EVERY_S:
            self._since_s = now_s
            self._said.clear()
        kind = _NUMBER.sub("#", note)
        if kind not in self._said and len(self._said) < _MOST_NOTES:
            self._said.add(kind)
            logger.info("%s: %s", self._batch_id, note)
