"""What a person sees while a run goes on: counters, and a bar or plain lines that show them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from conserve_sgl.client.clock import Clock

__all__ = ["DONE", "INTERRUPTED", "SOME_FAILED", "Meter", "ProgressView", "duration"]

DONE, SOME_FAILED, INTERRUPTED = 0, 1, 130
"""Exit codes of a command that ran to its end, or was stopped."""
TICK_S = 1.0
PLAIN_PERIOD_S = 5.0
# Long enough to smooth a batch of long answers, short enough to show a stall.
RATE_WINDOW_S = 60.0


class Meter:
    """Counters of a run, and their rates over the last minute.

    Args:
        total: lines of the run.
        started_s: when the run began to send, on the clock that `tick` is given.
    """

    def __init__(self, total: int, started_s: float) -> None:
        self.total = total
        self.resumed = 0
        self.done = 0
        self.failed = 0
        self.retries = 0
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.note: str | None = None
        self._marks: deque[tuple[float, int, int, int]] = deque([(started_s, 0, 0, 0)])

    def count(self, prompt_tokens: int, completion_tokens: int) -> None:
        """A line was finished in this run, and took so many tokens."""
        self.done += 1
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def noted(self, text: str | None) -> None:
        """A request waits to be sent again, for the reason `text`; None: something was answered."""
        self.note = text
        self.retries += text is not None

    @property
    def left(self) -> int:
        """Lines that are neither finished nor failed."""
        return self.total - self.resumed - self.done - self.failed

    def exit_code(self) -> int:
        """What the run has come to: lines that are left were left by an interrupt."""
        if self.left:
            return INTERRUPTED
        return SOME_FAILED if self.failed else DONE

    def tick(self, now_s: float) -> None:
        """Remember the counters as of now, for the rates."""
        settled = self.done + self.failed
        self._marks.append((now_s, settled, self.prompt_tokens, self.completion_tokens))
        while len(self._marks) > 2 and self._marks[1][0] < now_s - RATE_WINDOW_S:
            self._marks.popleft()

    def rates(self) -> tuple[float, float, float]:
        """Lines, prompt tokens and completion tokens per second over the last minute."""
        (start_s, *start), (end_s, *end) = self._marks[0], self._marks[-1]
        span_s = end_s - start_s
        if span_s <= 0:
            return 0.0, 0.0, 0.0
        lines, prompt, completion = ((b - a) / span_s for a, b in zip(start, end, strict=True))
        return lines, prompt, completion

    def text(self) -> str:
        """One line: done, tokens/s in and out, time left, failures, retries."""
        lines, prompt, completion = self.rates()
        eta = duration(self.left / lines) if lines > 0 else "-"
        parts = [
            f"{self.resumed + self.done}/{self.total} done",
            f"{prompt:.0f} in {completion:.0f} out tok/s",
            f"ETA {eta if self.left else '0s'}",
            f"{self.failed} failed",
        ]
        if self.retries:
            parts.append(f"{self.retries} retries")
        if self.note:
            parts.append(self.note)
        return " | ".join(parts)


class ProgressView:
    """Shows a meter: a live bar on a terminal, else a line every few seconds."""

    def __init__(self, console: Console, name: str, meter: Meter) -> None:
        self._console = console
        self._name = name
        self._meter = meter
        self._printed_s: float | None = None
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(name, total=meter.total, text="")

    def __enter__(self) -> ProgressView:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._update()
        self._bar.stop()

    def refresh(self, now_s: float) -> None:
        """Show the counters as of now."""
        self._meter.tick(now_s)
        self._update()
        if self._console.is_terminal:
            return
        if self._printed_s is None or now_s - self._printed_s >= PLAIN_PERIOD_S:
            self._printed_s = now_s
            self.say(self._meter.text())

    async def keep_fresh(self, clock: Clock, sync: Callable[[], None] | None = None) -> None:
        """`refresh` every second, for ever, and call `sync` in a thread as often."""
        while True:
            self.refresh(clock.monotonic_s())
            await clock.sleep(TICK_S)
            if sync is not None:
                await asyncio.to_thread(sync)

    def say(self, text: str) -> None:
        """One line that stays."""
        self._console.print(f"{self._name}: {text}", markup=False, highlight=False, soft_wrap=True)

    def _update(self) -> None:
        settled = self._meter.total - self._meter.left
        self._bar.update(self._task, completed=settled, text=self._meter.text())


def duration(seconds: float) -> str:
    """`seconds` for people: 45s, 12m30s, 3h05m."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest}s"
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    return f"{minutes // 60}h{minutes % 60:02}m"
