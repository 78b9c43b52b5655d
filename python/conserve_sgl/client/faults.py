"""Why lines failed, for a person: how many for which reason, and where the first one is."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["Faults"]

MAX_KINDS = 100
"""Reasons that are told apart; a server that words each one anew must not fill the memory."""
SHOWN = 5
_NUMBER = re.compile(r"\d+")
_OTHERS = (None, "other reasons")


class Faults:
    """Failed lines by kind: by status, and by what was said, whatever numbers were in it."""

    def __init__(self) -> None:
        self.total = 0
        self._kinds: dict[tuple[int | None, str], int] = {}
        self._firsts: dict[tuple[int | None, str], str] = {}

    def add(self, where: str, status: int | None, reason: str) -> None:
        """Count a line that failed.

        Args:
            where: which line it is.
            status: None without an HTTP answer.
            reason: what the server said, or what happened.
        """
        said = " ".join(reason.split())
        kind = (status, _NUMBER.sub("#", said))
        first = f"{'' if status is None else f'{status} '}{said} ({where})"
        if kind not in self._kinds and len(self._kinds) >= MAX_KINDS:
            kind, first = _OTHERS, _OTHERS[1]
        self.total += 1
        self._kinds[kind] = self._kinds.get(kind, 0) + 1
        self._firsts.setdefault(kind, first)

    def lines(self) -> Iterator[str]:
        """A line for each of the most frequent kinds: how often, and the first of them."""
        kinds = sorted(self._kinds, key=lambda kind: -self._kinds[kind])
        for kind in kinds[:SHOWN]:
            yield f"{self._kinds[kind]:,} x {self._firsts[kind]}"
        if rest := sum(self._kinds[kind] for kind in kinds[SHOWN:]):
            yield f"{rest:,} x {_OTHERS[1]}"
