"""The table of the resume benchmark; the figures themselves come from an engine."""

from __future__ import annotations

import pytest

from conserve_sgl.bench.micro import resume
from conserve_sgl.bench.micro.resume import ResumeRow, measure_resume, server_flags, table


def test_a_row_gives_both_times_and_their_ratio():
    row = ResumeRow(
        4096,
        recompute_ms=5000,
        resume_ms=250,
        resident_ms=210,
        found_tokens=4095,
        found_on_host=4000,
        host_bytes=1_000_000_000,
    )
    lines = table([row]).splitlines()
    assert lines[-1] == "| 4,096 | 5,000 ms | 250 ms | 20.0 | 4,095 | 4,000 | 210 ms | 25.0 GB/s |"
    assert len({line.count("|") for line in lines}) == 1


def test_no_rate_is_stated_where_the_copy_took_no_time():
    row = ResumeRow(64, 9, resume_ms=3, resident_ms=3, found_tokens=63, found_on_host=0)
    assert table([row]).endswith("| 3 ms | - |\n")


def test_the_host_cache_holds_every_context_and_the_device_only_the_longest():
    flags = dict(flag.split("=") for flag in server_flags((100, 1000)) if "=" in flag)
    pool = int(flags["--max-total-tokens"])
    assert 1000 < pool < 1100 + 1000
    assert int(flags["--hicache-ratio"]) * pool >= 1100


class Device:
    """A device pool of so many tokens over a host that keeps everything; answers as a server."""

    def __init__(self, pool_tokens: int) -> None:
        self.pool_tokens = pool_tokens
        self.resident: list[tuple[int, ...]] = []
        self.on_host: set[tuple[int, ...]] = set()
        self.asked = 0

    def first_token(self, _http: object, ids: list[int]) -> tuple[float, dict]:
        """Milliseconds: a tenth of one for a token computed, a hundredth for one loaded."""
        context, self.asked = tuple(ids), self.asked + 1
        found = len(ids) - 1 if context in self.on_host else 0
        loaded = 0 if context in self.resident else found
        self.resident = [other for other in self.resident if other != context] + [context]
        while sum(map(len, self.resident)) > self.pool_tokens:
            self.resident.pop(0)
        self.on_host.add(context)
        slow = 1000.0 if self.asked <= 5 else 0.0  # first steps compile
        details = {"cached_tokens": found, "cached_tokens_details": {"host": loaded}}
        return slow + 5 + (len(ids) - found) / 10 + loaded / 100, details


def test_a_context_is_pushed_out_before_it_is_resumed_and_first_rounds_do_not_count(monkeypatch):
    device = Device(pool_tokens=1640)
    monkeypatch.setattr(resume, "_first_token", device.first_token)

    short, long = measure_resume("http://unused", (100, 1000), rounds=3, bytes_per_token=10)

    for row, tokens in ((short, 100), (long, 1000)):
        assert row.found_tokens == row.found_on_host == tokens - 1
        assert row.recompute_ms == 5 + tokens / 10
        assert row.resume_ms == pytest.approx(5.1 + (tokens - 1) / 100)
        assert row.resident_ms == pytest.approx(5.1)
        assert row.host_bytes == 10 * (tokens - 1)
    assert device.asked == 2 * 4 * 5  # in each round computed, two fillers, resumed, resident
