from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.report.results import (
    Result,
    by_system,
    read_folder,
    read_run,
    run_folder,
    write_run,
    write_together,
)
from conserve_sgl.errors import InputError

Make = Callable[..., Result]
Record = Callable[..., RequestRecord]


def written(out: Path, *results: Result) -> list[Path]:
    folders = [run_folder(out, r.run.system.name, r.run.repeat) for r in results]
    for folder, result in zip(folders, results, strict=True):
        folder.mkdir(parents=True)
        write_run(folder, result)
    return folders


def test_a_run_comes_back_from_disk_as_it_was(result: Make, record: Record, tmp_path: Path) -> None:
    records = (record(1.0, (1.1, 1.2)), record(2.0, (), error="HTTP 503"))
    one = result(records, counters_after={"preempted": 3, "arrival_ms.p50": 1.5}, idle_share=0.25)

    written(tmp_path, one)

    assert read_folder(tmp_path) == [one]


def test_a_run_that_was_cut_short_does_not_count(result: Make, tmp_path: Path) -> None:
    (folder,) = written(tmp_path, result())
    (folder / "run.json").rename(folder / "run.json.partial")

    assert read_run(folder) is None
    with pytest.raises(InputError, match="holds no finished run"):
        read_folder(tmp_path)


def test_a_result_of_another_version_is_named(result: Make, tmp_path: Path) -> None:
    (folder,) = written(tmp_path, result())
    (folder / "run.json").write_text('{"system": "x"}')

    with pytest.raises(InputError, match=r"run\.json: is no result"):
        read_folder(tmp_path)


def test_runs_and_requests_are_put_together_one_a_line(
    result: Make, record: Record, tmp_path: Path
) -> None:
    results = [result((record(),), repeat=r) for r in (1, 2)]

    write_together(tmp_path, results)

    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    requests = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [run["repeat"] for run in runs] == [1, 2]
    assert [(r["system"], r["repeat"], r["class"]) for r in requests] == [
        ("ours", 1, "online"),
        ("ours", 2, "online"),
    ]


def test_counters_are_what_was_added_and_other_numbers_the_last(result: Make) -> None:
    one = result(
        counters_before={"preempted": 3, "arrival_ms.p50": 1.0},
        counters_after={"preempted": 5, "arrival_ms.p50": 1.5, "yields": 2},
    )

    assert one.run.counters == {"preempted": 2, "arrival_ms.p50": 1.5, "yields": 2}


def test_repeats_of_a_system_count_together(result: Make, record: Record, offline: Record) -> None:
    fast, slow = record(0.0, (0.1,)), record(0.0, (0.9,))
    (system,) = by_system(
        [
            result((fast, offline(1.0, 5.0, 20)), idle_share=0.2),
            result((slow, offline(1.0, 5.0, 60)), idle_share=0.4, repeat=2),
        ]
    )

    assert system.online.sent == 2
    assert system.online.ttft_ms.mean == pytest.approx(500)
    assert system.online.slo_attainment == pytest.approx(0.5)
    assert system.offline.total_tokens_per_s == pytest.approx((8 + 20 + 8 + 60) / 20)
    assert system.idle_share == pytest.approx(0.3)


def test_a_load_that_a_system_did_not_get_is_absent(result: Make, record: Record) -> None:
    (online,) = by_system([result((record(),), load="online")])
    (offline,) = by_system([result((), load="offline")])

    assert online.offline is None
    assert offline.online is None
    assert offline.online_intervals == {}


def test_intervals_of_one_repeat_resample_requests(result: Make, record: Record) -> None:
    records = tuple(record(0.0, (0.01 * i, 0.01 * i + 0.05)) for i in range(1, 101))
    (system,) = by_system([result(records)])

    found = system.online_intervals

    # The standard error of the median of 100 uniform values on (0, 1 s) is about 50 ms.
    median = found["TTFT P50"]
    assert 350 < median.low < 505 < median.high < 650
    assert found["TPOT P50"].low == pytest.approx(50)
    assert found["TPOT P50"].high == pytest.approx(50)
    assert 0.3 < found["SLO met"].low < 0.5 < found["SLO met"].high < 0.7
    assert system.offline_interval(lambda summary: summary.total_tokens_per_s) is None


def test_intervals_of_several_repeats_resample_the_repeats(
    result: Make, record: Record, offline: Record
) -> None:
    """Requests that are all alike within a run say nothing of how runs differ."""
    (system,) = by_system(
        [
            result((record(0.0, (ttft_s,)), offline(1.0, 5.0, tokens)), repeat=r)
            for r, ttft_s, tokens in ((1, 0.1, 12), (2, 0.2, 22), (3, 0.3, 32))
        ]
    )

    ttft = system.online_intervals["TTFT P50"]
    assert (ttft.low, ttft.high) == (pytest.approx(100), pytest.approx(300))
    rate = system.offline_interval(lambda summary: summary.output_tokens_per_s)
    assert rate.low == pytest.approx(1.2)
    assert rate.high == pytest.approx(3.2)


def test_intervals_are_the_same_every_time(result: Make, record: Record) -> None:
    records = tuple(record(0.0, (0.01 * i,)) for i in range(1, 30))

    one, two = (by_system([result(records)])[0].online_intervals for _ in range(2))

    assert one["TTFT P99"] == two["TTFT P99"]
    assert math.isnan(one["TPOT P50"].low)  # single tokens have none


def test_a_line_has_the_figures_by_which_systems_are_compared(
    result: Make, record: Record, offline: Record, tmp_path: Path
) -> None:
    good, slow = record(0.0, (0.1, 0.15)), record(0.0, (0.9, 0.95))
    results = [
        result((good,), name="base", kind="stock", load="online"),
        result((offline(1.0, 5.0, 92),), name="alone", kind="stock", load="offline"),
        result((good, slow, offline(1.0, 5.0, 32))),
    ]

    write_together(tmp_path, results, {"ours": 8.0})

    lines = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    base, alone, ours = lines
    assert [line["system"] for line in lines] == ["base", "alone", "ours"]
    assert base["offline_tok_s"] is None
    assert alone["p99_ttft_ms"] is None
    assert alone["share_of_ceiling"] is None
    assert ours["slo_met_share"] == 0.5
    assert ours["offline_tok_s"] == pytest.approx(4)
    assert ours["share_of_offline_only"] == pytest.approx(0.4)
    assert ours["share_of_ceiling"] == pytest.approx(0.5)
    assert ours["p99_itl_ms"] == pytest.approx(50)
    assert ours["system_config"]["name"] == "ours"
