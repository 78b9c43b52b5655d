"""What the doctor says of the host cache: a table of flags and machines."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from conserve_sgl import doctor
from conserve_sgl.doctor import Level, host_cache
from conserve_sgl.emulation import DEVICE_ENV


def args(**changes) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "enable_hierarchical_cache": True,
            "hicache_write_policy": "write_through",
            "hicache_size": 0,
            "hicache_ratio": None,
            "mem_fraction_static": 0.5,
            "tp_size": 1,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "free_gib", "device_gib", "level", "said"),
    [
        ({"enable_hierarchical_cache": False}, 500, 80, Level.NOTE, "--enable-hierarchical-cache"),
        ({"hicache_write_policy": "write_back"}, 500, 80, Level.NOTE, "write_back copies too late"),
        ({}, 91, 80, Level.OK, "80 GiB of 81 GiB"),
        ({}, 89, 80, Level.NOTE, "lower --hicache-size"),
        ({"hicache_ratio": 4.0}, 91, 80, Level.NOTE, "160 GiB"),
        ({"tp_size": 2}, 91, 80, Level.NOTE, "160 GiB"),
        ({"hicache_size": 50}, 91, 80, Level.OK, "47 GiB of 81 GiB"),
        ({"hicache_size": 50}, 40, None, Level.NOTE, "47 GiB of 40 GiB"),
        ({"hicache_size": 50}, 5, 80, Level.NOTE, "of 0 GiB"),
        ({}, 40, None, Level.OK, "--hicache-ratio"),
    ],
)
def test_the_host_cache(changes, free_gib, device_gib, level, said):
    finding = host_cache(args(**changes), free_gib=free_gib, device_gib=device_gib)
    assert finding.level is level
    assert said in finding.detail


def test_an_emulated_device_is_not_taken_for_this_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(DEVICE_ENV, "h100-llama8b-triton")
    device = next(finding for finding in doctor._machine() if finding.what == "device")
    assert device.level is Level.NOTE
    assert "h100-llama8b-triton, emulated" in device.detail
