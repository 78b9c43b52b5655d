from __future__ import annotations

import io

import pytest
from rich.console import Console

from conserve_sgl.client.progress import Meter, ProgressView, duration


def test_rates_and_time_left_are_of_this_run_and_of_the_last_minute():
    meter = Meter(total=100, started_s=1000.0)
    meter.resumed = 40
    assert "40/100 done | 0 in 0 out tok/s | ETA -" in meter.text()
    for second in range(10):
        meter.count(30, 20)
        meter.tick(1001.0 + second)
    assert meter.rates() == (1.0, 30.0, 20.0)
    assert "50/100 done | 30 in 20 out tok/s | ETA 50s | 0 failed" in meter.text()
    for second in range(120):  # then nothing for two minutes
        meter.tick(1011.0 + second)
    assert meter.rates() == (0.0, 0.0, 0.0)


def test_failures_count_as_settled_and_waits_are_shown():
    meter = Meter(total=2, started_s=0.0)
    meter.failed, meter.retries, meter.note = 1, 7, "http://h: 503 full; retry in 2.0 s"
    assert meter.left == 1
    assert meter.text().endswith("1 failed | 7 retries | http://h: 503 full; retry in 2.0 s")


def test_plain_output_is_a_line_every_few_seconds():
    console = Console(file=io.StringIO(), width=200)
    with ProgressView(console, "job", Meter(total=3, started_s=0.0)) as view:
        for tenth in range(111):
            view.refresh(tenth / 10)
    assert len(console.file.getvalue().splitlines()) == 3  # at 0, 5 and 10 s


def test_a_terminal_gets_a_bar():
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    meter = Meter(total=4, started_s=0.0)
    with ProgressView(console, "job", meter) as view:
        meter.count(1, 1)
        view.refresh(1.0)
    assert "━" in console.file.getvalue()
    assert "1/4 done" in console.file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (750, "12m30s"), (11100, "3h05m")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
