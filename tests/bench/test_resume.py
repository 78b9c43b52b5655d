"""The table of the resume benchmark; the figures themselves come from an engine."""

from __future__ import annotations

from conserve_sgl.bench.resume import ResumeRow, server_flags, table


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
