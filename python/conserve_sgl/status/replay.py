"""A recording, shown: what bounded offline work from when to when, and the sums."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from conserve_sgl.status.fetch import Seen
from conserve_sgl.status.kinds import shares
from conserve_sgl.status.record import Step
from conserve_sgl.status.recording import read_recording
from conserve_sgl.status.screen import span, whole_screen

__all__ = ["replay"]

_LONGEST_WAIT_S = 1.0
"""Between two looks that were further apart, time is left out."""


def replay(path: Path, console: Console) -> None:
    """Play a recording in a terminal as it was, and say what was in it; elsewhere only the latter.

    Ctrl-C leaves the film for the summary.

    Raises:
        InputError: it is none.
    """
    if console.is_terminal:
        _play(path, console)
    for line in _summary(list(read_recording(path))):
        console.print(Text(line, overflow="fold"), soft_wrap=True)


def _play(path: Path, console: Console) -> None:
    latest: dict[str, Seen] = {}
    before_s: float | None = None
    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            for seen in read_recording(path):
                wait_s = 0.0 if before_s is None else seen.at_s - before_s
                time.sleep(min(max(wait_s, 0.0), _LONGEST_WAIT_S))
                before_s, latest[seen.endpoint] = seen.at_s, seen
                live.update(whole_screen(list(latest.values())), refresh=True)
        except KeyboardInterrupt:
            return


def _summary(looks: Sequence[Seen]) -> Iterator[str]:
    for endpoint in dict.fromkeys(seen.endpoint for seen in looks):
        own = [seen for seen in looks if seen.endpoint == endpoint]
        lasted = span(own[-1].at_s - own[0].at_s)
        yield f"{endpoint}: {len(own):,} looks from {_clock(own[0].at_s)} on, {lasted}"
        yield from (f"  {line}" for line in _changes(own))
        yield f"  {_steps(own)}"


def _changes(looks: Iterable[Seen]) -> Iterator[str]:
    """A line for every change of what bounds offline work, or of whether the server answers."""
    before: str | None = None
    for seen in looks:
        now = seen.is_ or (seen.snapshot.why.bound if seen.snapshot else "")
        if now != before:
            text = seen.snapshot.why.text if seen.snapshot else seen.fault
            yield f"{_clock(seen.at_s)}  {text}"
        before = now


def _steps(looks: Sequence[Seen]) -> str:
    steps: list[Step] = [step for seen in looks if seen.snapshot for step in seen.snapshot.steps]
    lost = sum(seen.lost_steps for seen in looks)
    gaps = f", {lost:,} lost between looks" if lost else ""
    if not steps:
        return f"no steps{gaps}"
    parts = ", ".join(f"{kind} {share:.0%}" for kind, share in shares(steps).items())
    return f"{len(steps):,} steps{gaps}: {parts}"


def _clock(at_s: float) -> str:
    return datetime.fromtimestamp(at_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")
