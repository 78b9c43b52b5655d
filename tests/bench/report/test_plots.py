from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.report.plots import write_plots
from conserve_sgl.bench.report.results import Result, by_system

Make = Callable[..., Result]
Record = Callable[..., RequestRecord]


@pytest.fixture
def results(result: Make, record: Record, offline: Record) -> list[Result]:
    """Online alone, offline alone, and five systems with both, three of them on one dial."""
    good = tuple(record(float(i), (i + 0.1, i + 0.15 + i / 100)) for i in range(8))
    failed = record(3.0, (), error="HTTP 503")
    work = (offline(1.0, 5.0, 90), offline(4.0, 9.0, 40))
    beside = [result((*good, failed, *work[:n]), name=f"dial-{n}", dial=f"{n}x") for n in (0, 1, 2)]
    return [
        result(good, name="online-only", kind="stock", load="online", idle_share=0.5),
        result(work, name="offline-only", kind="stock", load="offline"),
        result((*good, *work), name="stock", kind="stock"),
        result((failed, *work), name="starved", kind="stock"),
        *beside,
    ]


def test_the_pictures_show_something(results: list[Result], tmp_path: Path) -> None:
    from matplotlib.image import imread

    written = write_plots(by_system(results), tmp_path)

    assert written == ["latency_cdf.png", "over_time.png", "tradeoff.png"]
    for name in written:
        pixels = imread(tmp_path / name)
        assert min(pixels.shape[:2]) > 400
        assert pixels[..., :3].std() > 0.04


@pytest.mark.parametrize(
    ("kept", "expected"),
    [
        ((0,), ["latency_cdf.png", "over_time.png"]),
        ((1,), []),
        ((0, 2), ["latency_cdf.png", "over_time.png", "tradeoff.png"]),
        ((2,), ["latency_cdf.png", "over_time.png"]),
        ((3,), []),
    ],
)
def test_what_cannot_be_drawn_is_left_out(
    results: list[Result], tmp_path: Path, kept: tuple[int, ...], expected: list[str]
) -> None:
    assert write_plots(by_system([results[i] for i in kept]), tmp_path) == expected
