"""Where the next request goes: the servers of one run, and what is known of each.

The one whose window is the emptiest gets it, or the home of its prompt's beginning while that is
about as empty. One that has enough to do is left alone for as long as it asks for, or until it
says that it takes more; one that takes no connections for a pause that grows; and when none has
answered for `server_down_s` the run ends.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf

from conserve_sgl.client.bounds import MOST_IN_FLIGHT
from conserve_sgl.client.clock import Clock, first_of
from conserve_sgl.client.interrupt import Stopped
from conserve_sgl.client.retry import Retry, RetryRule
from conserve_sgl.client.window import Window
from conserve_sgl.errors import JobError

__all__ = ["Endpoint", "Endpoints"]

_BEGIN = 8
"""Requests that one of several servers gets at first: what one takes is not known yet."""

_HOME_MAY_HAVE = 1.25, 4
"""A prompt goes to its home while that has at most so many times and so many more in flight than
the emptiest server."""


@dataclass(eq=False)
class Endpoint:
    """One server, as this client sees it. `in_flight` includes requests that wait to be retried;
    `is_own` says whether it is this very process."""

    url: str
    window: Window
    in_flight: int = 0
    refusals: int = 0
    benched_until_s: float = 0.0
    busy_until_s: float = 0.0
    identified: bool = False
    is_own: bool = False
    paths: dict[str, bool] = field(default_factory=dict)  # whether they are there, once known
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    # When it last said what it would take, as far as is known, and what was sent to it since then.
    said_s: float = -inf
    sent_s: deque[float] = field(default_factory=lambda: deque(maxlen=MOST_IN_FLIGHT))

    def forget(self) -> None:
        """Ask anew what it serves."""
        self.identified = False
        self.paths.clear()
        self.said_s = -inf
        self.sent_s.clear()

    def spare_beside(self, spare: int, said_s: float) -> int | None:
        """Of what it said at `said_s` that it would take, what is left beside the requests that it
        had not seen then; None where it has said something since."""
        if said_s < self.said_s:
            return None
        self.said_s = said_s
        while self.sent_s and self.sent_s[0] <= said_s:
            self.sent_s.popleft()
        return max(spare - len(self.sent_s), 0)

    def takes_more(self, now_s: float) -> bool:
        """Whether one more may be sent to it now."""
        return self.opens_s <= now_s and self.in_flight < self.window.size

    @property
    def opens_s(self) -> float:
        """When it is to be left alone no more."""
        return max(self.benched_until_s, self.busy_until_s)


class Endpoints:
    """The servers of one run.

    Args:
        urls: base URLs; none where they are to be found.
        most: requests in flight at one of them at most.
        stopping: once set, there is none to be picked.
    """

    def __init__(
        self,
        urls: Sequence[str],
        retry: Retry,
        rule: RetryRule,
        *,
        most: int,
        stopping: asyncio.Event,
        clock: Clock,
    ) -> None:
        self._most = most
        self._down_s = retry.server_down_s
        self._rule = rule
        self._stopping = stopping
        self._clock = clock
        self._last_answer_s = clock.monotonic_s()
        self._room = asyncio.Event()
        self._turn = asyncio.Lock()
        self.all: list[Endpoint] = []
        self.use(urls)

    def use(self, urls: Sequence[str]) -> None:
        """From here on these. Of one that is among them already all that is known stays; one that
        is not gets nothing more, and what it has in flight goes on."""
        known = {endpoint.url: endpoint for endpoint in self.all}
        urls = dict.fromkeys(url.rstrip("/") for url in urls)
        begin = self._most if len(urls) == 1 else min(_BEGIN, self._most)
        self.all = [known.get(url) or Endpoint(url, Window(self._most, begin)) for url in urls]
        self._room.set()

    def home(self, beginning: bytes) -> Endpoint | None:
        """The server that prompts which begin so have in common, so that they find each other's KV
        there; None while it has too much to do, next to the others."""
        if len(self.all) < 2:
            return None
        # Rendezvous hashing: when a server comes or goes, only its own prompts move.
        home = max(self.all, key=lambda e: blake2b(e.url.encode() + b"\0" + beginning).digest())
        times, more = _HOME_MAY_HAVE
        least = min(endpoint.in_flight for endpoint in self.all)
        return home if home.in_flight <= times * least + more else None

    async def pick(self, near: Endpoint | None = None) -> Endpoint:
        """The one to send to, which is `near` while that takes more; waits until there is one, and
        who waits has a turn in order. It has one more in flight from here on, until `leave`.

        Raises:
            Stopped: the run is being stopped.
            JobError: none has answered for `server_down_s`.
        """
        async with self._turn:  # of thousands that wait one looks for room, and not all of them
            return await self._pick(near)

    async def _pick(self, near: Endpoint | None) -> Endpoint:
        while True:
            if self._stopping.is_set():
                raise Stopped
            now_s = self._clock.monotonic_s()
            free = [e for e in self.all if e.takes_more(now_s)]
            if free:
                picked = near
                if near not in free:
                    picked = min(free, key=lambda e: (e.in_flight / e.window.size, e.in_flight))
                picked.in_flight += 1
                return picked
            is_down = all(e.benched_until_s > now_s for e in self.all)
            if is_down and now_s - self._last_answer_s >= self._down_s:
                names = ", ".join(e.url for e in self.all) or "any server"
                raise JobError(
                    f"no answer from {names} for {self._down_s:g} s. Finished lines are kept; run "
                    "the same command again to go on"
                )
            self._room.clear()
            waits = [self._room.wait(), self._stopping.wait()]
            shut = [e.opens_s for e in self.all if e.opens_s > now_s]
            if shut or is_down:  # that nobody is there is looked at again, too
                waits.append(self._clock.sleep(min(shut, default=now_s + 1.0) - now_s))
            await first_of(*waits)

    def leave(self, endpoint: Endpoint) -> None:
        """What was picked for it is over."""
        endpoint.in_flight -= 1
        self._room.set()

    def answered(self, endpoint: Endpoint) -> None:
        """It has answered, whatever it was."""
        self._last_answer_s = self._clock.monotonic_s()
        endpoint.refusals = 0

    def sent(self, endpoint: Endpoint) -> float:
        """A request goes to it now; when that is, on the clock."""
        now_s = self._clock.monotonic_s()
        endpoint.sent_s.append(now_s)
        return now_s

    def served(self, endpoint: Endpoint, spare: int | None, said_s: float | None = None) -> None:
        """It has done what it was asked for, and says how many more it would take, or nothing.

        Args:
            said_s: when it said so, on the clock, if that is known. What was sent to it later it
                had not seen, and takes of that.
        """
        if spare is not None and said_s is not None:
            spare = endpoint.spare_beside(spare, said_s)
            if spare is None:
                return
        endpoint.window.answered(endpoint.in_flight, spare)
        if spare:
            endpoint.busy_until_s = 0.0
        self._room.set()

    def refused(self, endpoint: Endpoint, wait_s: float) -> None:
        """It has enough to do, and asks for a pause of so long."""
        now_s = self._clock.monotonic_s()
        endpoint.window.refused(endpoint.in_flight, now_s)
        if endpoint.busy_until_s <= now_s:  # of many at once the first one counts
            endpoint.busy_until_s = now_s + wait_s

    def bench(self, endpoint: Endpoint) -> float:
        """It takes no connections: leave it alone for the seconds that this returns."""
        endpoint.forget()
        now_s = self._clock.monotonic_s()
        if endpoint.benched_until_s <= now_s:  # all in flight see one refusal: it counts once
            endpoint.refusals += 1
            endpoint.benched_until_s = now_s + self._rule.pause_s(endpoint.refusals)
        return endpoint.benched_until_s - now_s
