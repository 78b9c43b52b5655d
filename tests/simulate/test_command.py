"""The command, from a file to its folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from conserve_sgl.bench.command import compare_folders
from conserve_sgl.bench.report.results import by_system, read_folder
from conserve_sgl.cli import app
from conserve_sgl.errors import InputError
from conserve_sgl.simulate.command import run_simulation
from simulate.test_config import SMALL

KEYS = {
    "system",
    "slo_met_share",
    "offline_tok_s",
    "share_of_offline_only",
    "share_of_ceiling",
    "p99_ttft_ms",
    "p99_tpot_ms",
    "p99_itl_ms",
}


def simulated(tmp_path: Path, text: str = SMALL, **options) -> tuple[Path, str]:
    """The folder, and what was said on stderr."""
    path, out = tmp_path / "small.yaml", tmp_path / "out"
    path.write_text(text)
    said = io.StringIO()
    run_simulation(path, console=Console(file=said, width=300), out=out, **options)
    return out, said.getvalue()


def runs_of(out: Path) -> dict[str, dict]:
    lines = (out / "runs.jsonl").read_text().splitlines()
    return {run["system"]: run for run in map(json.loads, lines)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return simulated(tmp_path_factory.mktemp("simulated"))[0]


def test_a_system_a_line_with_the_figures_that_a_benchmark_writes(folder):
    runs = runs_of(folder)
    assert list(runs)[:3] == ["online-only", "offline-only", "first-come"]
    assert all(run.keys() >= KEYS for run in runs.values())
    assert runs["online-only"]["offline_tok_s"] is None
    assert runs["online-only"]["slo_met_share"] == 1.0
    assert runs["offline-only"]["p99_ttft_ms"] is None
    assert runs["offline-only"]["share_of_offline_only"] == 1.0
    conserve = runs["conserve"]
    alone = runs["offline-only"]["offline_tok_s"]
    assert conserve["share_of_offline_only"] == pytest.approx(conserve["offline_tok_s"] / alone)
    assert 0 < conserve["share_of_ceiling"] < 1.1
    assert 0 < conserve["p99_itl_ms"] < 1000
    assert conserve["system_config"]["kind"] == "conserve"


def test_the_folder_reads_like_a_benchmarks(folder):
    systems = {system.name: system for system in by_system(read_folder(folder))}
    assert systems["conserve"].online.sent == systems["online-only"].online.sent > 0
    assert "| conserve | offline total |" in compare_folders(folder, folder)


def test_pictures_and_tables_are_there(folder):
    names = {path.name for path in folder.iterdir()}
    pictures = {"latency_cdf.png", "over_time.png", "tradeoff.png", "dial.png"}
    assert names == {"runs", "runs.jsonl", "requests.jsonl", "table.md", *pictures}
    table = (folder / "table.md").read_text()
    for text in (
        "| conserve |",
        "| of ceiling |",
        "Ceiling at TTFT 300ms, TPOT 20ms:",
        "| conserve-15ms | TTFT 300ms, TPOT 15ms |",
        "million offline tokens a day",
        "of one that does offline work alone",
        "nine tenths of the most that the dial gives",
        "Simulated, not measured: h100-llama8b-fa3",
    ):
        assert text in table


def test_the_same_simulation_gives_the_same_figures(folder, tmp_path):
    again, _ = simulated(tmp_path, systems=["conserve"])
    first, second = runs_of(folder)["conserve"], runs_of(again)["conserve"]
    assert {key: first[key] for key in KEYS} == {key: second[key] for key in KEYS}
    assert not runs_of(again).get("first-come")


def test_an_objective_that_nothing_meets_is_said_in_a_sentence(tmp_path):
    out, said = simulated(tmp_path, systems=["conserve"], changes={"slo.tpot": "4ms", "dial": "[]"})
    assert "a decode step of one row takes 6." in said
    assert "longer than the objective for the time per token, 4 ms: no schedule meets it" in said
    assert "no schedule meets it" in (out / "table.md").read_text()
    assert not (out / "dial.png").exists()


def test_bad_input_ends_with_2_and_leaves_nothing(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(SMALL.replace("seed: 3", "seed: -3"))
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["simulate", str(path), "--out", str(out)])
    assert "bad.yaml:1: seed" in str(done.exception)
    assert not out.exists()
    done = CliRunner().invoke(app, ["simulate", str(path), "--set", "slo.tpot"])
    assert done.exit_code == 2
    assert "give KEY=VALUE" in done.output


def test_a_stream_of_nothing_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"online\.arrivals: no online request arrives within 4 s"):
        simulated(tmp_path, changes={"online.arrivals.rate_per_s": "0.0001"})
    assert not (tmp_path / "out").exists()


def test_a_window_without_requests_is_refused(tmp_path, shared_data):
    trace = shared_data / "azure_llm_2023_conv.csv"
    lengths = SMALL[SMALL.index("    kind: gamma") : SMALL.index("  duration_s: 4")]
    azure = (
        f"    {{kind: azure, path: {trace}, offset_s: 1000000, max_prompt_tokens: 9, "
        "max_output_tokens: 9}\n"
    )
    with pytest.raises(InputError, match="no request from 1000000"):
        simulated(tmp_path, SMALL.replace(lengths, azure))
