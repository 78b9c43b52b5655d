"""`scripts/fleet_bench.py`, whose lines stand in docs/fleet.md."""

from __future__ import annotations

import subprocess
import sys


def test_a_batch_over_a_slow_server_and_one_that_is_killed_becomes_a_row_of_the_table(checkout):
    options = ["--servers", "3", "--lines", "300", "--rate", "600"]
    script = checkout / "scripts" / "fleet_bench.py"
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    servers, what, lines, _rate, _refused, memory, shares, most = (
        cell.strip() for cell in done.stdout.strip().strip("|").split("|")
    )
    assert (servers, what, lines) == ("3", "1 slow, 1 killed", "300")
    assert memory.endswith(" MiB")
    assert 0 < int(shares.split()[0]) < 300
    assert 0 < int(most) <= 40
