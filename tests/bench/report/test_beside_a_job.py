"""A run whose offline work was a job: the same tables and pictures as of any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.report.metrics import Slo
from conserve_sgl.bench.report.offline import OfflineRecord
from conserve_sgl.bench.report.plots import plot_over_time
from conserve_sgl.bench.report.results import Result, SystemResult, by_system
from conserve_sgl.bench.report.tables import plain_markdown, side_by_side

STARTED = 1_700_000_000.0
FIELDS = {"slo": Slo(ttft_ms=500, tpot_ms=150), "started_unix_s": STARTED, "window_s": 20.0}


@pytest.fixture
def phases(
    record: Callable[..., RequestRecord], result: Callable[..., Result]
) -> list[SystemResult]:
    """Alone everything is well; beside the job one request is slow and one fails."""
    well = tuple(record(float(t), (t + 0.1, t + 0.2, t + 0.3)) for t in range(10))
    slow = record(10.0, (12.0, 12.1, 12.2))
    failed = record(11.0, (), error="HTTP 503")
    job = OfflineRecord(
        done_unix_s=STARTED + 20, latency_s=20, prompt_tokens=4000, completion_tokens=2000
    )
    alone = result(well, name="alone", load="online", duration_s=21.0, **FIELDS)
    beside = result((*well, slow, failed), name="beside", duration_s=22.0, **FIELDS)
    return by_system([alone, msgspec.structs.replace(beside, job=(job,))])


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().split("|")[1:-1]]


def test_the_markdown_table_holds_the_figures(phases: list[SystemResult]) -> None:
    header, rule, alone, beside, *_ = plain_markdown(phases).splitlines()

    assert len(cells(header)) == len(cells(rule)) == len(cells(alone)) == len(cells(beside))
    alone_cells = dict(zip(cells(header), cells(alone), strict=True))
    beside_cells = dict(zip(cells(header), cells(beside), strict=True))
    assert alone_cells["TTFT P50"] == "100 ms"
    assert alone_cells["TPOT P99"] == "100 ms"
    assert alone_cells["SLO met"] == "100 %"
    assert alone_cells["offline total"] == "-"
    assert beside_cells["requests"] == "11/12"
    assert beside_cells["SLO met"] == "83 %"
    assert beside_cells["offline in"] == "200"
    assert beside_cells["offline out"] == "100"
    assert beside_cells["offline total"] == "300"


def test_the_page_says_what_was_measured_on_what(phases: list[SystemResult]) -> None:
    text = plain_markdown(phases)

    assert "Objectives: TTFT 500 ms, TPOT 150 ms. Window 20 s, seed 1" in text
    assert "a cpu, 2 cores, 8 GiB" in text
    assert "Offline: tokens a second" in text
    assert "- beside: 1 of 12 online requests failed; first: HTTP 503" in text


def test_the_terminal_table_sets_the_phases_side_by_side(phases: list[SystemResult]) -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(side_by_side(phases))

    (met,) = [line for line in capture.get().splitlines() if "SLO met" in line]
    assert "100 %" in met
    assert "83 %" in met


def test_the_rate_over_time_is_the_jobs(phases: list[SystemResult]) -> None:
    (beside,) = phases[1].results

    rates = beside.offline_rates([0.0, 10.0, 20.0, 30.0])

    assert rates.computed.tolist() == pytest.approx([200, 200, 0], abs=1e-3)
    assert rates.output.tolist() == pytest.approx([100, 100, 0], abs=1e-3)


@pytest.mark.parametrize("count", [1, 2])
def test_the_plot_is_a_png_with_something_on_it(
    phases: list[SystemResult], tmp_path: Path, count: int
) -> None:
    from matplotlib.image import imread

    path = tmp_path / "plot.png"

    plot_over_time(phases[:count], path)

    pixels = imread(path)
    assert pixels.shape[1] > 500 * count
    assert pixels[..., :3].std() > 0.05


def test_a_phase_in_which_nothing_was_sent_is_still_reported(
    result: Callable[..., Result], tmp_path: Path
) -> None:
    nothing = msgspec.structs.replace(result(name="empty", **FIELDS), job=())
    empty = by_system([nothing])

    plot_over_time(empty, tmp_path / "plot.png")

    assert cells(plain_markdown(empty).splitlines()[2])[:3] == ["empty", "0/0", "-"]
