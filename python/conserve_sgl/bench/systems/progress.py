"""What a run that takes minutes says where bars and spinners show nothing: in a pipe or a log."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

__all__ = ["PlainProgress"]

_PERIOD_S = 10.0


class PlainProgress:
    """Lines on a console that is no terminal; nothing on one that is.

    Args:
        console: where they go.
        clock: monotonic, in seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._said_s = clock()

    def say(self, text: str) -> None:
        """One line."""
        if not self._console.is_terminal:
            self._said_s = self._clock()
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def still(self, text: str) -> None:
        """One line, unless there was one in the last ten seconds."""
        if self._clock() - self._said_s >= _PERIOD_S:
            self.say(text)
