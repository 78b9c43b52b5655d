"""Lines where a bar shows nothing, on a clock of the test."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from conserve_sgl.bench.systems.progress import PlainProgress


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def said_on(clock: Clock, *, terminal: bool) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=20)
    plain = PlainProgress(console, clock)
    plain.say("[begins] and is longer than the width")
    for _ in range(25):
        clock.now_s += 1
        plain.still(f"still at {clock.now_s:g}")
    return console.file.getvalue().splitlines()


def test_a_pipe_gets_a_line_now_and_then(clock):
    assert said_on(clock, terminal=False) == [
        "[begins] and is longer than the width",
        "still at 110",
        "still at 120",
    ]


def test_a_terminal_has_its_bar(clock):
    assert said_on(clock, terminal=True) == []
