"""The table of the slice micro-benchmark; the figures themselves come from an engine."""

from __future__ import annotations

from conserve_sgl.bench.slice_cost import Measured, table


def test_a_row_gives_both_rates_and_their_ratio():
    lines = table([Measured(tokens=2048, plain_s=2.0, sliced_s=2.5, slices=30.2)]).splitlines()
    assert lines[-1] == "| 2,048 | 1,024 | 819 | 0.800 | 30 |"
    assert len({line.count("|") for line in lines}) == 1
