"""What a run prints, awaited."""

from __future__ import annotations

import io
import threading


class Screen(io.StringIO):
    """A console's file that knows when a text was printed."""

    def __init__(self, awaited: str) -> None:
        super().__init__()
        self._awaited = awaited
        self.seen = threading.Event()

    def write(self, text: str) -> int:
        if self._awaited in text:
            self.seen.set()
        return super().write(text)
