"""The table of the slice micro-benchmark; the figures themselves come from an engine."""

from __future__ import annotations

from conserve_sgl.bench.slice_cost import Measured, Met, table, yields


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
