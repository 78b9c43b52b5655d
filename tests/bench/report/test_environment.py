from __future__ import annotations

import msgspec

from conserve_sgl.bench.report.environment import environment


def test_machine_and_versions_are_named() -> None:
    here = environment()

    assert here.cores >= 1
    assert here.memory_gib > 0
    assert {"sglang", "torch", "numpy"} <= set(here.versions)
    assert f"{here.cores} cores" in here.hardware
    assert msgspec.json.decode(msgspec.json.encode(here))["python"] == here.python
