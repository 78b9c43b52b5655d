"""When the platform serves, and that it stays out of the way otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from conserve_sgl import platform
from conserve_sgl.emulation import DEVICE_ENV, SCALE_ENV
from conserve_sgl.errors import IncompatibleError
from conserve_sgl.platform import activate

CHOSEN = "conserve_sgl.platform.cpu:CpuPlatform"
EMULATED = "conserve_sgl.platform.emulated.platform:EmulatedPlatform"
MODELS = "SGLANG_EXTERNAL_MODEL_PACKAGE"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SGLANG_PLATFORM", "CONSERVE_CONFIG", DEVICE_ENV, SCALE_ENV):
        monkeypatch.delenv(name, raising=False)
    # Set, then removed: monkeypatch restores what was there, whatever activate() writes.
    for name in ("GOMP_SPINCOUNT", MODELS):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("named", "config", "accelerator", "answer"),
    [
        (None, None, None, None),
        (None, None, "cuda", None),
        (None, "conserve.yaml", None, CHOSEN),
        (None, "conserve.yaml", "cuda", None),
        (None, "conserve.yaml", "mps", None),
        (None, "", None, None),
        ("conserve_cpu", None, None, CHOSEN),
        ("conserve_cpu", "conserve.yaml", None, CHOSEN),
        ("other", None, None, None),
        ("other", "conserve.yaml", None, None),
    ],
)
def test_choice(
    monkeypatch: pytest.MonkeyPatch,
    named: str | None,
    config: str | None,
    accelerator: str | None,
    answer: str | None,
) -> None:
    _machine(monkeypatch, accelerator)
    if named is not None:
        monkeypatch.setenv("SGLANG_PLATFORM", named)
    if config is not None:
        monkeypatch.setenv("CONSERVE_CONFIG", config)
    assert activate() == answer
    assert ("GOMP_SPINCOUNT" in os.environ) == (answer is not None)


@pytest.mark.parametrize("config", [None, "conserve.yaml"])
@pytest.mark.parametrize(
    ("named", "answer"), [(None, EMULATED), ("conserve_cpu", EMULATED), ("other", None)]
)
def test_a_device_that_is_named_is_emulated_for_stock_servers_too(
    monkeypatch: pytest.MonkeyPatch, named: str | None, config: str | None, answer: str | None
) -> None:
    _machine(monkeypatch, None)
    monkeypatch.setenv(DEVICE_ENV, "some-gpu")
    if named is not None:
        monkeypatch.setenv("SGLANG_PLATFORM", named)
    if config is not None:
        monkeypatch.setenv("CONSERVE_CONFIG", config)
    assert activate() == answer
    expected = "conserve_sgl.platform.emulated" if answer else None
    assert os.environ.get(MODELS) == expected


def test_an_emulated_device_beside_an_accelerator_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _machine(monkeypatch, "cuda")
    monkeypatch.setenv(DEVICE_ENV, "some-gpu")
    with pytest.raises(IncompatibleError, match=DEVICE_ENV):
        activate()


def test_a_bad_scale_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, None)
    monkeypatch.setenv(DEVICE_ENV, "some-gpu")
    monkeypatch.setenv(SCALE_ENV, "0")
    with pytest.raises(IncompatibleError, match=SCALE_ENV):
        activate()


def test_named_beside_an_accelerator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, "cuda")
    monkeypatch.setenv("SGLANG_PLATFORM", platform.NAME)
    with pytest.raises(IncompatibleError, match="CUDA_VISIBLE_DEVICES"):
        activate()


def test_a_spin_count_that_was_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, None)
    monkeypatch.setenv("SGLANG_PLATFORM", platform.NAME)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    activate()
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_the_package_imports_neither_torch_nor_sglang() -> None:
    check = (
        "import sys, conserve_sgl.platform; sys.exit(bool({'torch', 'sglang'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def _machine(monkeypatch: pytest.MonkeyPatch, accelerator: str | None) -> None:
    device = torch.device(accelerator) if accelerator else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: device)
