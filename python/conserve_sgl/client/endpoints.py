"""Where the next request goes: the servers of one run, and what is known of each.

The least loaded one gets it. One that takes no connections is left alone for a pause that grows,
and when none has answered for `server_down_s` the run ends.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from conserve_sgl.client.clock import Clock
from conserve_sgl.client.interrupt import Stopped, pause
from conserve_sgl.client.retry import Retry, RetryRule
from conserve_sgl.errors import JobError

__all__ = ["Endpoint", "Endpoints", "check_endpoint"]


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


class Endpoints:
    """The servers of one run.

    Args:
        urls: base URLs, at least one.
        stopping: once set, there is none to be picked.
    """

    def __init__(
        self,
        urls: Sequence[str],
        retry: Retry,
        rule: RetryRule,
        *,
        stopping: asyncio.Event,
        clock: Clock,
    ) -> None:
        self.all = [Endpoint(url.rstrip("/")) for url in urls]
        self._down_s = retry.server_down_s
        self._rule = rule
        self._stopping = stopping
        self._clock = clock
        self._last_answer_s = clock.monotonic_s()

    async def pick(self, near: Endpoint | None = None) -> Endpoint:
        """The one to send to, which is `near` while that is up; waits until there is one.

        Raises:
            Stopped: the run is being stopped.
            JobError: none has answered for `server_down_s`.
        """
        while True:
            if self._stopping.is_set():
                raise Stopped
            now_s = self._clock.monotonic_s()
            up = [e for e in self.all if e.benched_until_s <= now_s]
            if near in up:
                return near
            if up:
                return min(up, key=lambda e: e.in_flight)
            if now_s - self._last_answer_s >= self._down_s:
                raise JobError(
                    f"no answer from {', '.join(e.url for e in self.all)} for {self._down_s:g} s. "
                    "Finished lines are kept; run the same command again to go on"
                )
            await pause(
                min(e.benched_until_s for e in self.all) - now_s, self._stopping, self._clock
            )

    def answered(self, endpoint: Endpoint) -> None:
        """It has answered, whatever it was."""
        self._last_answer_s = self._clock.monotonic_s()
        endpoint.refusals = 0

    def bench(self, endpoint: Endpoint) -> float:
        """It takes no connections: leave it alone for the seconds that this returns."""
        endpoint.forget()
        now_s = self._clock.monotonic_s()
        if endpoint.benched_until_s <= now_s:  # all in flight see one refusal: it counts once
            endpoint.refusals += 1
            endpoint.benched_until_s = now_s + self._rule.pause_s(endpoint.refusals)
        return endpoint.benched_until_s - now_s


def check_endpoint(url: str) -> None:
    """Raise ValueError unless `url` is a server's base URL."""
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url) or not url.isprintable():
        raise ValueError(f"endpoints: {url!r} is not a base URL such as http://127.0.0.1:30000")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as e:  # UnicodeError is one: a name that cannot be looked up
        raise ValueError(f"endpoints: {url!r} is not a URL: {e}") from e
    if not host or port == 0:
        raise ValueError(f"endpoints: {url!r} has no {'port' if host else 'host'}")
    if re.search(r"/(v1|generate)(/|$)", url):
        raise ValueError(f"endpoints: give {url!r} without /v1 or /generate; they are added")
