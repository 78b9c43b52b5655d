"""Whether a request that got no answer is sent again, and when: one rule for whoever sends.

| what happens                                  | what is done                                    |
|-----------------------------------------------|-------------------------------------------------|
| 429, 503: the server has enough to do         | sent again, without limit, after what           |
|                                               | Retry-After asks for and a pause                |
| 408, 500, 502, 504, a connection that was     | sent again after a pause, until it was lost     |
| lost, a 200 whose body is no answer           | `max_attempts` times                            |
| any other status                              | it is the answer                                |

The pause doubles with every failure up to `max_delay_s`, and up to half of it is left to chance:
what was refused at one time does not come back at one time.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import Enum

import msgspec

from conserve_sgl.client.bounds import Count, Seconds
from conserve_sgl.client.clock import Clock

__all__ = ["Attempts", "Passing", "Retry", "RetryRule", "backoff_s", "retry_after_s"]

_BUSY = frozenset({429, 503})
_LOST = frozenset({408, 500, 502, 504})


class Retry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to do when a request fails; how long to keep at it."""

    first_delay_s: Seconds = 0.5
    max_delay_s: Seconds = 30.0
    max_attempts: Count = 5
    server_down_s: Seconds = 600.0
    max_failures_in_a_row: Count = 100


@dataclass
class Attempts:
    """How often the requests of one line were sent; `lost` of them count towards the limit."""

    sent: int = 0
    busy: int = 0
    lost: int = 0


class Passing(Enum):
    """Why there is no answer this time, though there may be one the next time."""

    BUSY = "busy"
    LOST = "lost"

    @classmethod
    def of(cls, status: int) -> Passing | None:
        """What an HTTP `status` means; None where it comes with an answer, be it a refusal."""
        if status in _BUSY:
            return cls.BUSY
        return cls.LOST if status in _LOST else None


class RetryRule:
    """The rule, with the numbers of one run. `clock` reads the dates of Retry-After."""

    def __init__(self, retry: Retry, *, clock: Clock, rng: random.Random) -> None:
        self._retry = retry
        self._clock = clock
        self._rng = rng

    def wait_s(
        self, why: Passing, attempts: Attempts, retry_after: str | None = None
    ) -> float | None:
        """Seconds until the request may be sent again, None when it has failed. Counts `attempts`.

        Args:
            retry_after: the header of the reply, if it had one.
        """
        if why is Passing.BUSY:
            attempts.busy += 1
            asked_s = retry_after_s(retry_after, self._clock.wall_s())
            return (asked_s or 0.0) + self.pause_s(attempts.busy)
        attempts.lost += 1
        if attempts.lost >= self._retry.max_attempts:
            return None
        return self.pause_s(attempts.lost)

    def pause_s(self, failures: int) -> float:
        """Seconds to wait after the `failures`-th failure in a row, from 1."""
        return backoff_s(self._retry, failures, self._rng)


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
