"""The page and the summary of a run on a GPU, from results on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from conserve_sgl import cli
from conserve_sgl.bench.gpu.page import first_seconds, page, write_page
from conserve_sgl.bench.gpu.parts import Setting
from conserve_sgl.bench.gpu.state import State, States
from conserve_sgl.bench.gpu.summary import summary
from conserve_sgl.bench.report.environment import Environment
from conserve_sgl.bench.report.results import run_folder, write_run
from conserve_sgl.errors import InputError

GPU = Environment(
    "a cpu", 16, 125.0, ("NVIDIA H100 80GB HBM3",), "Linux", "3.12", {"sglang": "0.5.23"}, "c0",
    driver="580.1, 1980 MHz",
)  # fmt: skip


@pytest.fixture
def results(tmp_path: Path, result: Callable, record: Callable, offline: Callable) -> Path:
    """A run with three systems, one cost and two parts."""
    online = tuple(record(float(n), (n + 0.1, n + 0.12, n + 0.15)) for n in range(60))
    work = tuple(offline(float(n), n + 1.0, 100) for n in range(60))
    fields = {"environment": GPU, "window_s": 60.0, "duration_s": 61.0, "clocks": "1755 MHz, 600 W"}
    for made in (
        result(online, name="online-only", kind="stock", load="online", **fields),
        result(work, name="offline-only", kind="stock", load="offline", **fields),
        result(online + work[:30], name="conserve", dial="25 ms", **fields),
    ):
        folder = run_folder(tmp_path / "llama8b-fa3", made.run.system.name, 1)
        folder.mkdir(parents=True)
        write_run(folder, made)
    (tmp_path / "costs" / "resume").mkdir(parents=True)
    (tmp_path / "costs" / "resume" / "resume.md").write_text("| resumed |\n")
    states = States(tmp_path / "machine" / "parts.json")
    states.note("stock", State(0, 200.4, 3.0))
    states.note("conserve", State(3, 100.0, 203.4))
    machine = tmp_path / "machine"
    (machine / "environment.json").write_bytes(msgspec.json.encode(GPU))
    (machine / "backend.json").write_text('{"use": "fa3"}')
    return tmp_path


def test_the_page_says_what_was_measured_and_on_what(results: Path):
    text = page(results)

    assert text.startswith("# NVIDIA H100 80GB HBM3, 2023-11-14\n")
    assert "580.1, 1980 MHz" in text
    assert "1755 MHz, 600 W" in text
    assert "## llama8b, attention fa3" in text
    row = next(line for line in text.splitlines() if line.startswith("| conserve | 60 |"))
    assert "| 60/60 | 100 / 100 | 25.0 / 25.0 | 30 / 30 | 100.0% |" in row
    assert "| 50% |" in row
    assert "| resumed |" in text
    assert (
        "| stock | online-only, offline-only, stock-priority, on one server | done | 200 s" in text
    )
    assert "| out of time | 100 s |" in text
    assert "| not run | - |" in text


def test_the_first_seconds_of_a_run_are_a_row_of_their_own(results: Path):
    assert "| conserve | 45 | 45/45 |" in page(results)


def test_a_cut_run_holds_the_requests_that_were_due(result, record, offline):
    whole = result((record(1.0, (1.5,)), record(9.0, (9.5,)), offline(2.0, 3.0, 5)))
    cut = first_seconds(whole, 5.0)
    assert [r.due_s for r in cut.online] == [1.0]
    assert len(cut.offline) == 1
    assert cut.offline_summary().duration_s == 5.0


def test_page_and_picture_are_written_by_a_command(results: Path, tmp_path: Path):
    to = tmp_path / "page.md"
    done = CliRunner().invoke(cli.app, ["bench", "--page", str(results), "--out", str(to)])
    assert done.exit_code == 0, done.output
    assert "![offline share over ITL P99](page.png)" in to.read_text()
    assert (tmp_path / "page.png").stat().st_size > 1000


def test_a_page_without_a_file_is_refused(results: Path):
    done = CliRunner().invoke(cli.app, ["bench", "--page", str(results)])
    assert done.exit_code == 2


def test_without_offline_work_alone_there_is_no_share_and_no_picture(results: Path, tmp_path: Path):
    for path in (results / "llama8b-fa3" / "runs" / "offline-only.1").iterdir():
        path.unlink()
    write_page(results, tmp_path / "page.md")
    assert not (tmp_path / "page.png").exists()
    assert "![" not in (tmp_path / "page.md").read_text()


def test_a_folder_without_a_run_is_bad_input(tmp_path: Path):
    (tmp_path / "llama8b-fa3" / "runs").mkdir(parents=True)
    with pytest.raises(InputError, match="holds no finished run"):
        page(tmp_path)


def test_the_summary_holds_everything_in_a_hundred_lines(results: Path):
    text = summary(Setting(results=results))
    assert len(text.splitlines()) < 100
    for said in ("NVIDIA H100", "580.1", "attention fa3", "| conserve |", "| resumed |"):
        assert said in text
    assert "stock done, 200 s; conserve out of time, 100 s." in text


def test_a_run_without_results_has_a_summary_too(tmp_path: Path):
    assert summary(Setting(results=tmp_path)) == ""
