from __future__ import annotations

from collections.abc import Iterator

import pytest

from conserve_sgl.bench.micro import operations


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "_BUDGET_S", 0.0)
    monkeypatch.setattr(operations, "_LEAST", 20)


def test_every_operation_is_timed() -> None:
    told: list[operations.Row] = []

    rows = operations.run_micros(told.append)

    assert rows == told
    assert {"plan a step", "look for arrivals, none"} <= {row.name for row in rows}
    assert {row.requests for row in rows if row.name == "plan a step"} == set(operations.SIZES)
    for row in rows:
        assert 0 < row.median_us <= row.p99_us
        assert row.iterations == 20
    assert operations.micro_table(rows).row_count == len(rows)


def test_a_further_one_is_a_decorated_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "MICROS", [])
    calls: list[str] = []

    @operations.micro
    def noted() -> Iterator[operations.Row]:
        yield operations.measure(
            "note", 3, lambda: calls.append("timed"), before=lambda: calls.append("before")
        )

    (row,) = operations.run_micros()

    assert (row.name, row.requests) == ("note", 3)
    assert calls[:4] == ["before", "timed"] * 2
