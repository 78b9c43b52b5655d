from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from conserve_sgl.bench.load.arrivals import (
    Arrival,
    AzureTrace,
    Gamma,
    Lengths,
    MooncakeTrace,
    OnOff,
    Source,
)
from conserve_sgl.errors import InputError

PROMPT = Lengths(median_tokens=100, max_tokens=400, min_tokens=20, sigma=0.5)
OUTPUT = Lengths(median_tokens=16, max_tokens=16)
POISSON = Gamma(rate_per_s=5.0, prompt=PROMPT, output=OUTPUT)
BURSTY = OnOff(
    rate_on_per_s=20.0,
    rate_off_per_s=1.0,
    mean_on_s=5.0,
    mean_off_s=15.0,
    prompt=PROMPT,
    output=OUTPUT,
)
HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
AZURE_ROWS = """\
2023-11-16 18:15:46.0000000,374,44
2023-11-16 18:15:48.5000000,4000,8
2023-11-16 18:15:56.0000000,879,900
"""


def times(arrivals: tuple[Arrival, ...]) -> np.ndarray:
    return np.array([arrival.at_s for arrival in arrivals])


@pytest.fixture
def azure_csv(tmp_path: Path) -> Path:
    path = tmp_path / "azure.csv"
    path.write_text(f"{HEADER}\n{AZURE_ROWS}")
    return path


@pytest.mark.parametrize("source", [POISSON, BURSTY])
def test_same_seed_same_stream_and_other_seed_another(source: Source) -> None:
    assert source.draw(60, 1) == source.draw(60, 1)
    assert source.draw(60, 1) != source.draw(60, 2)


@pytest.mark.parametrize("source", [POISSON, BURSTY])
def test_arrivals_are_in_order_and_inside_the_duration(source: Source) -> None:
    at_s = times(source.draw(60, 3))

    assert (np.diff(at_s) >= 0).all()
    assert at_s.min() >= 0
    assert at_s.max() < 60


@pytest.mark.parametrize("cv", [0.3, 1.0, 2.0])
def test_gamma_keeps_its_rate_and_its_coefficient_of_variation(cv: float) -> None:
    source = Gamma(rate_per_s=5.0, cv=cv, prompt=PROMPT, output=OUTPUT)

    gaps = np.diff(times(source.draw(4000, 0)))

    assert 1 / gaps.mean() == pytest.approx(5.0, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_on_off_keeps_its_mean_rate_and_is_burstier_than_poisson() -> None:
    at_s = times(BURSTY.draw(20_000, 0))

    counts, _ = np.histogram(at_s, bins=np.arange(0, 20_001, 5))

    assert len(at_s) / 20_000 == pytest.approx((20 * 5 + 1 * 15) / 20, rel=0.1)
    assert counts.var() / counts.mean() > 5  # 1 for a Poisson process


def test_lengths_stay_in_bounds_around_the_median() -> None:
    drawn = np.array([arrival.prompt_tokens for arrival in POISSON.draw(1000, 0)])

    assert np.median(drawn) == pytest.approx(100, rel=0.05)
    assert drawn.min() >= 20
    assert drawn.max() <= 400


def test_other_lengths_do_not_move_the_arrivals() -> None:
    longer = msgspec.structs.replace(POISSON, prompt=Lengths(median_tokens=300, max_tokens=300))

    assert (times(longer.draw(60, 1)) == times(POISSON.draw(60, 1))).all()


def test_azure_is_stretched_scaled_and_cut(azure_csv: Path) -> None:
    trace = AzureTrace(
        path=str(azure_csv),
        stretch=2.0,
        length_divisor=4.0,
        min_tokens=4,
        max_prompt_tokens=500,
        max_output_tokens=100,
    )

    assert trace.draw(30) == (Arrival(0.0, 94, 11), Arrival(5.0, 500, 4), Arrival(20.0, 220, 100))


def test_azure_window_is_in_the_traces_own_time(azure_csv: Path) -> None:
    trace = AzureTrace(
        path=str(azure_csv), offset_s=1, stretch=2, max_prompt_tokens=9999, max_output_tokens=9999
    )

    assert trace.draw(18) == (Arrival(3.0, 4000, 8),)


def test_a_window_without_requests_is_refused(azure_csv: Path) -> None:
    trace = AzureTrace(path=str(azure_csv), offset_s=99, max_prompt_tokens=1, max_output_tokens=1)

    with pytest.raises(InputError, match="no request from 99"):
        trace.draw(60)


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ("yesterday,1,2", "TIMESTAMP"),
        ("2023-11-16 18:15:46.0,many,2", "ContextTokens"),
        ("2023-11-16 18:15:46.0,1,-2", "GeneratedTokens"),
        ("2023-11-16 18:15:46.0,1", "GeneratedTokens"),
    ],
)
def test_a_bad_azure_row_is_refused_by_file_line_and_column(
    azure_csv: Path, row: str, key: str
) -> None:
    azure_csv.write_text(f"{HEADER}\n{AZURE_ROWS}{row}\n")

    with pytest.raises(InputError) as refused:
        AzureTrace(path=str(azure_csv), max_prompt_tokens=9, max_output_tokens=9).draw(60)

    assert (refused.value.path, refused.value.line, refused.value.key) == (azure_csv, 5, key)


def test_another_csv_is_refused_by_its_header(azure_csv: Path) -> None:
    azure_csv.write_text("a,b\n1,2\n")

    with pytest.raises(InputError, match=f"{azure_csv}:1: the header is not {HEADER}"):
        AzureTrace(path=str(azure_csv), max_prompt_tokens=9, max_output_tokens=9).draw(60)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    trace = MooncakeTrace(path=str(tmp_path / "no"), max_prompt_tokens=9, max_output_tokens=9)

    with pytest.raises(InputError, match="cannot be read"):
        trace.draw(60)


def test_mooncake_rows_are_read_and_a_bad_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mooncake.jsonl"
    rows = [
        {"timestamp": 0, "input_length": 6000, "output_length": 50, "hash_ids": [1, 2]},
        {"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [1]},
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    trace = MooncakeTrace(path=str(path), max_prompt_tokens=1000, max_output_tokens=40)

    assert trace.draw(60) == (
        Arrival(0.0, 1000, 40, (1, 2), 512),
        Arrival(3.0, 700, 5, (1,), 512),
    )
    quarter = msgspec.structs.replace(trace, length_divisor=4.0)
    assert quarter.draw(60)[1] == Arrival(3.0, 175, 1, (1,), 128)

    path.write_text(path.read_text() + '{"timestamp": 1, "input_length": "x"}\n')
    with pytest.raises(InputError, match=rf"{path}:3: .*input_length"):
        trace.draw(60)


def test_the_real_azure_trace_replays(shared_data: Path) -> None:
    trace = AzureTrace(
        path=str(shared_data / "azure_llm_2023_conv.csv"),
        stretch=15,
        length_divisor=8,
        max_prompt_tokens=256,
        max_output_tokens=40,
    )

    duration_s = 15 * 58 * 60
    arrivals = trace.draw(duration_s)

    assert len(arrivals) / duration_s == pytest.approx(5.53 / 15, rel=0.01)
    assert max(arrival.prompt_tokens for arrival in arrivals) == 256
    assert min(arrival.output_tokens for arrival in arrivals) >= 1


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "gamma", "rate_per_s": 0},
        {"kind": "on_off", "rate_on_per_s": -1},
        {"kind": "azure", "path": "x", "max_prompt_tokens": 0, "max_output_tokens": 1},
        {"kind": "uniform"},
    ],
)
def test_a_source_that_cannot_be_is_refused(bad: dict) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(bad, Source)
