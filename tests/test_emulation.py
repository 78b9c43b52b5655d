"""What the environment says of an emulated device."""

from __future__ import annotations

import pytest

from conserve_sgl.emulation import DEVICE_ENV, SCALE_ENV, Emulation
from conserve_sgl.errors import IncompatibleError


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (DEVICE_ENV, SCALE_ENV):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", [None, ""])
def test_nothing_is_emulated_unless_a_device_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    monkeypatch.setenv(SCALE_ENV, "4")
    if name is not None:
        monkeypatch.setenv(DEVICE_ENV, name)
    assert Emulation.from_environment() is None


@pytest.mark.parametrize(("text", "scale"), [(None, 1.0), ("", 1.0), ("1", 1.0), ("2.5", 2.5)])
def test_time_runs_as_slowly_as_it_is_told(
    monkeypatch: pytest.MonkeyPatch, text: str | None, scale: float
) -> None:
    monkeypatch.setenv(DEVICE_ENV, "h100")
    if text is not None:
        monkeypatch.setenv(SCALE_ENV, text)
    assert Emulation.from_environment() == Emulation("h100", scale)


@pytest.mark.parametrize("text", ["0.5", "-1", "fast", "nan", "inf", "1001"])
def test_a_scale_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(DEVICE_ENV, "h100")
    monkeypatch.setenv(SCALE_ENV, text)
    with pytest.raises(IncompatibleError, match=f"{SCALE_ENV}={text}"):
        Emulation.from_environment()


def test_a_server_finds_what_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    emulation = Emulation("a/device.json", 2.5)
    for name, value in emulation.environment().items():
        monkeypatch.setenv(name, value)
    assert Emulation.from_environment() == emulation
