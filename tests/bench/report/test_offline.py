from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.report.offline import (
    OfflineRecord,
    read_results,
    spread,
    summarize_backlog,
    summarize_offline,
    token_rates,
)
from conserve_sgl.errors import InputError

LINE = {
    "id": "0",
    "output": "four",
    "done_unix_s": 1010.0,
    "latency_s": 10.0,
    "prompt_tokens": 100,
    "cached_tokens": 60,
    "completion_tokens": 20,
}


def write(path: Path, *lines: dict, torn: str = "") -> None:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + torn)


def test_tokens_count_by_the_share_of_a_requests_life_in_the_window() -> None:
    record = OfflineRecord(
        done_unix_s=1010, latency_s=10, prompt_tokens=100, completion_tokens=20, cached_tokens=60
    )

    half = summarize_offline([record], 1005, 1025)

    assert half.output_tokens == pytest.approx(10)
    assert half.input_tokens == pytest.approx(20)
    assert half.cached_tokens == pytest.approx(30)
    assert half.total_tokens_per_s == pytest.approx(30 / 20)
    assert half.completed == 1
    assert summarize_offline([record], 1011, 1021).total_tokens_per_s == 0


def test_no_work_is_zero() -> None:
    assert summarize_offline([], 0, 10).total_tokens_per_s == 0


def test_spread_keeps_the_total() -> None:
    rate = spread([0, 1, 3, 10], [0.5, 2], [2.5, 2], [8, 5])

    assert rate == pytest.approx([2, (6 + 5) / 2, 0])


def test_results_of_all_tasks_are_read_but_not_their_errors(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", LINE, LINE)
    write(tmp_path / "b.jsonl", {**LINE, "cached_tokens": None})
    write(tmp_path / "a.errors.jsonl", {"id": "1", "error": "HTTP 500"})

    first, _, last = read_results(tmp_path)

    assert (first.started_unix_s, first.computed_tokens) == (1000.0, 40)
    assert last.computed_tokens == 100


def test_a_line_cut_short_by_a_kill_is_no_fault(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", LINE, torn='{"id": "1", "done_un')

    assert len(read_results(tmp_path)) == 1


def test_a_line_that_is_no_result_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", LINE, {"id": "1"})

    with pytest.raises(InputError, match=r"a\.jsonl:2: not a result: .*done_unix_s"):
        read_results(tmp_path)


def test_a_job_without_results_is_empty(tmp_path: Path) -> None:
    assert read_results(tmp_path / "never-made") == ()


Make = Callable[..., RequestRecord]


def test_tokens_of_a_backlog_count_when_the_client_got_them(record: Make) -> None:
    # 8 prompt tokens computed from 0 to 2 s, one token at 2 s, four more until 4 s.
    one = record(0.0, (2.0, 4.0), tokens=(1, 4), error="did not finish in time")

    rates = token_rates([0, 1, 3, 5], [one])

    assert rates.computed == pytest.approx([4, 2, 0])
    assert rates.cached == pytest.approx([1, 0.5, 0])
    assert rates.output == pytest.approx([0, (1 + 2) / 2, 1])


def test_the_window_of_a_backlog_is_that_of_the_stream(record: Make) -> None:
    before = record(-4.0, (-3.0, -2.0))
    across = record(-1.0, (1.0, 3.0), tokens=(1, 2))
    waiting = record(1.0, (), error="did not finish in time")

    got = summarize_backlog([before, across, waiting], 2.0)

    assert got.input_tokens == pytest.approx(4)
    assert got.cached_tokens == pytest.approx(1)
    assert got.output_tokens == pytest.approx(1 + 1)
    assert got.completed == 0
    assert got.total_tokens_per_s == pytest.approx(6 / 2)
