from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.report.metrics import Slo
from conserve_sgl.bench.report.offline import OfflineRecord
from conserve_sgl.bench.report.phases import Phase, markdown_table, plot_phases, rich_table

SLO = Slo(ttft_ms=500, tpot_ms=150)
STARTED = 1_700_000_000.0


@pytest.fixture
def phases(record: Callable[..., RequestRecord]) -> tuple[Phase, Phase]:
    """Alone everything is well; beside the job one request is slow and one fails."""
    well = tuple(record(float(t), (t + 0.1, t + 0.2, t + 0.3)) for t in range(10))
    slow = record(10.0, (12.0, 12.1, 12.2))
    failed = record(11.0, (), error="HTTP 503")
    job = OfflineRecord(
        done_unix_s=STARTED + 20, latency_s=20, prompt_tokens=4000, completion_tokens=2000
    )
    return (
        Phase("alone", STARTED, 20.0, 21.0, well, None),
        Phase("beside", STARTED, 20.0, 22.0, (*well, slow, failed), (job,)),
    )


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().split("|")[1:-1]]


def test_the_markdown_table_holds_the_figures(phases: tuple[Phase, Phase]) -> None:
    header, rule, alone, beside = markdown_table(phases, SLO).splitlines()

    assert len(cells(header)) == len(cells(rule)) == len(cells(alone)) == len(cells(beside))
    alone_cells = dict(zip(cells(header), cells(alone), strict=True))
    beside_cells = dict(zip(cells(header), cells(beside), strict=True))
    assert alone_cells["TTFT P50"] == "100 ms"
    assert alone_cells["TPOT P99"] == "100 ms"
    assert alone_cells["SLO met"] == "100 %"
    assert alone_cells["offline tok/s"] == "-"
    assert beside_cells["requests"] == "11/12"
    assert beside_cells["SLO met"] == "83 %"
    assert beside_cells["offline in tok/s"] == "200"
    assert beside_cells["offline out tok/s"] == "100"
    assert beside_cells["offline tok/s"] == "300"


def test_the_terminal_table_sets_the_phases_side_by_side(phases: tuple[Phase, Phase]) -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(rich_table(phases, SLO))

    (met,) = [line for line in capture.get().splitlines() if "SLO met" in line]
    assert "100 %" in met
    assert "83 %" in met


@pytest.mark.parametrize("count", [1, 2])
def test_the_plot_is_a_png_with_something_on_it(
    phases: tuple[Phase, Phase], tmp_path: Path, count: int
) -> None:
    from matplotlib.image import imread

    path = tmp_path / "plot.png"

    plot_phases(phases[:count], SLO, path, caption="a machine")

    pixels = imread(path)
    assert pixels.shape[1] > 500 * count
    assert pixels[..., :3].std() > 0.05


def test_a_phase_in_which_nothing_was_sent_is_still_reported(tmp_path: Path) -> None:
    empty = Phase("empty", STARTED, 20.0, 20.0, (), ())

    plot_phases([empty], SLO, tmp_path / "plot.png")

    assert cells(markdown_table([empty], SLO).splitlines()[2])[:3] == ["empty", "0/0", "-"]
