"""The table of the slice micro-benchmark; the figures themselves come from an engine."""

from __future__ import annotations

import threading

from conserve_sgl.bench.micro import slice_cost
from conserve_sgl.bench.micro.slice_cost import Measured, Met, table, yields


def test_a_row_gives_both_rates_and_their_ratio():
    lines = table([Measured(tokens=2048, plain_s=2.0, sliced_s=2.5, slices=30.2)]).splitlines()
    assert lines[-1] == "| 2,048 | 1,024 | 819 | 0.800 | 30 |"
    assert len({line.count("|") for line in lines}) == 1


def test_arrivals_are_told_beside_offline_prefills_and_alone():
    slices = {"suspensions": 2, "layers_computed": 64, "batches_sliced": 2}
    slices["arrival_to_yield_ms"] = {"p50": 1.25, "p99": 4.0, "longest": 5.0}
    text = yields(Met([0.01, 0.01], [0.02, 0.03], offline_prompts=4, slices=slices))
    assert "2 arrivals beside 4 offline prefills, 2 suspensions" in text
    assert "1.2 ms (P50), 4.0 ms (P99), 5.0 ms (longest); 64 layers" in text
    assert "25.0 ms (P50), 29.9 ms (P99), 30.0 ms (longest); alone: 10.0 ms (P50)" in text


def test_arrivals_are_measured_alone_first_and_then_beside_offline_prefills(monkeypatch):
    asked: list[tuple[int, bool]] = []
    offline_began = threading.Event()

    def seconds(_self: object, tokens: int, headers: dict | None = None) -> float:
        asked.append((tokens, headers is not None))
        if headers is not None:
            offline_began.set()
        elif len([1 for _, offline in asked if not offline]) > 3:
            assert offline_began.wait(30)  # the first of those beside offline work
        return 0.25

    monkeypatch.setattr(slice_cost._Client, "seconds", seconds)
    monkeypatch.setattr(slice_cost._Client, "slices", lambda _: {"suspensions": 1})
    monkeypatch.setattr(slice_cost, "_LONGEST_PAUSE_S", 0.0)

    met = slice_cost._Client("http://unused").interrupt(2048, arrivals=3)

    assert (met.alone_s, met.beside_s) == ([0.25] * 3, [0.25] * 3)
    assert asked[:3] == [(16, False)] * 3
    assert met.offline_prompts == asked.count((2048, True)) >= 1
    assert met.slices == {"suspensions": 1}
