"""Preemption at random, for tests: set by an environment variable, read once."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import TypeVar

from conserve_sgl.errors import IncompatibleError

__all__ = ["PREEMPT_ENV", "RandomPreemption"]

PREEMPT_ENV = "CONSERVE_TEST_PREEMPT"
"""`SEED:SHARE`, as in `7:0.05`: before every decode step each offline request is preempted with
that chance."""

T = TypeVar("T")


class RandomPreemption:
    """Picks victims by chance, the same ones for the same seed and calls."""

    def __init__(self, *, seed: int, share: float) -> None:
        self._random = random.Random(seed)
        self._share = share

    @classmethod
    def from_environment(cls) -> RandomPreemption | None:
        """What `CONSERVE_TEST_PREEMPT` asks for; None when it is not set.

        Raises:
            IncompatibleError: it is not `SEED:SHARE` with a share from 0 to 1.
        """
        text = os.environ.get(PREEMPT_ENV, "")
        if not text:
            return None
        try:
            seed, share = text.split(":")
            chosen = cls(seed=int(seed), share=float(share))
        except ValueError as error:
            raise IncompatibleError(f"{PREEMPT_ENV} is SEED:SHARE, not {text!r}") from error
        if not 0 <= chosen._share <= 1:
            raise IncompatibleError(f"{PREEMPT_ENV} has a share from 0 to 1, not {chosen._share}")
        return chosen

    def victims(self, items: Iterable[T]) -> list[T]:
        """Those of `items` that are preempted now."""
        return [item for item in items if self._random.random() < self._share]
