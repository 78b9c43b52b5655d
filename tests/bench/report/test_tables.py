from __future__ import annotations

from collections.abc import Callable

import pytest
from rich.console import Console

from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.report.results import Result, SystemResult, by_system
from conserve_sgl.bench.report.tables import (
    Harvest,
    comparison,
    results_markdown,
    summary_line,
    terminal_table,
)

Make = Callable[..., Result]


@pytest.fixture
def systems(
    result: Make, record: Callable[..., RequestRecord], offline: Callable[..., RequestRecord]
) -> list[SystemResult]:
    """Idle half of the time; 10 offline tok/s alone, 4 beside online requests."""
    good = record(0.0, (0.1, 0.15))
    slow = record(0.0, (0.9, 0.95))
    return by_system(
        [
            result((good,), name="base", kind="stock", load="online", idle_share=0.5),
            result((offline(1.0, 5.0, 92),), name="alone", kind="stock", load="offline"),
            result(
                (good, slow, offline(1.0, 5.0, 32)),
                counters_after={"preempted": 7},
                idle_share=0.0,
            ),
        ]
    )


def cells(table: str, row: str) -> dict[str, str]:
    """The cells of a Markdown table's row, by column."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    header, found = lines[0], next(line for line in lines if line.startswith(f"| {row} |"))
    split = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (header, found)]
    return dict(zip(*split, strict=True))


def test_efficiency_is_over_what_the_idle_time_is_worth(systems: list[SystemResult]) -> None:
    harvest = Harvest(systems)

    assert harvest.idle_tokens_per_s == pytest.approx(0.5 * 10)
    assert harvest.efficiency(systems[2]) == pytest.approx(4 / 5)
    assert [harvest.efficiency(system) for system in systems[:2]] == [None, None]


def test_without_a_baseline_there_is_no_efficiency(systems: list[SystemResult]) -> None:
    assert Harvest(systems[1:]).efficiency(systems[2]) is None
    assert Harvest([systems[0], systems[2]]).efficiency(systems[2]) is None


def test_the_table_holds_the_figures(systems: list[SystemResult]) -> None:
    text = results_markdown(systems)

    ours = cells(text, "ours")
    assert ours["requests"] == "2/2"
    assert ours["TTFT P50"] == "500 ms"
    assert ours["TPOT P99"] == "50 ms"
    assert ours["SLO met"] == "50 %"
    assert ours["offline in"] == "1"
    assert ours["offline out"] == "3"
    assert ours["offline total"] == "4"
    assert ours["harvest"] == "80 %"
    assert cells(text, "base")["idle"] == "50 %"
    assert cells(text, "alone")["TTFT P50"] == "-"
    assert "10 tok/s alone x 50 % idle online-only = 5 tok/s" in text
    assert "| preempted | 7 |" in text
    assert "a cpu, 2 cores, 8 GiB" in text
    assert "sglang 0" in text
    assert "95 % bootstrap intervals" in text


def test_a_system_alone_is_reported_too(systems: list[SystemResult]) -> None:
    for system in systems:
        assert system.name in results_markdown([system])
        assert system.name in summary_line(system, Harvest([system]))


def test_the_terminal_shows_every_system(systems: list[SystemResult]) -> None:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(terminal_table(systems))

    assert all(system.name in capture.get() for system in systems)
    assert "80 %" in capture.get()


def test_a_narrow_terminal_cuts_neither_names_nor_figures(result: Make) -> None:
    names = [f"conserve-with-a-long-name-and-tpot-{factor}x" for factor in ("1.05", "1.25")]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(terminal_table(by_system([result((), name=name) for name in names])))

    shown = capture.get()
    assert "\u2026" not in shown
    folded = "".join(line.split("│")[1].strip() for line in shown.splitlines() if "│" in line)
    assert all(name in folded for name in names)


def test_requests_that_failed_are_told_with_the_first_reason(
    result: Make, record: Callable[..., RequestRecord]
) -> None:
    refused = record(0.0, (), error="HTTP 429: the queue is full")
    cut_off = record(0.0, (), error="did not finish in time")

    text = results_markdown(by_system([result((record(), cut_off, refused, refused))]))

    assert "- ours: 2 of 4 online requests failed; first: HTTP 429: the queue is full" in text


def test_two_results_side_by_side(
    systems: list[SystemResult], result: Make, record: Callable[..., RequestRecord]
) -> None:
    slower = by_system([result((record(0.0, (0.3, 0.35)),), name="base", kind="stock", seed=2)])

    text = comparison(systems, slower)

    assert "| base | TTFT P50 | 100 ms | 300 ms | 3.00x |" in text
    assert "| base | SLO met | 100 % | 100 % | 1.00x |" in text
    assert "| ours |" not in text
    assert "Another seed: 1 and 2." in text
    assert "Another machine" not in text


def test_results_that_share_no_system_cannot_be_compared(systems: list[SystemResult]) -> None:
    assert comparison(systems[:1], systems[1:]).startswith("No system is in both.")


def test_another_configuration_is_said(systems: list[SystemResult], result: Make) -> None:
    other = by_system([result((), fingerprint="g")])
    assert "Measured under another configuration: ours." in comparison(systems, other)
