"""What an operator may change while a server runs, and how it travels.

It travels as SGLang's own `/set_internal_state`, behind SGLang's own keys and to all its ranks at
the same step, which takes numbers by name:

    conserve_offline                     1 runs offline work, 0 pauses it, 2 ends it
    conserve_ttft_ms, conserve_ttft_x    `slo.ttft`, as a time or as a factor
    conserve_tpot_ms, conserve_tpot_x    `slo.tpot`
    conserve_yield_ms                    `slo.yield_ms`
    conserve_batches                     1 sends the lines of batches, 0 holds them

The last one is for the HTTP process, on whose way the others pass; the scheduler keeps it to show
it with them.

Nothing is written to disk: a server starts with its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import msgspec

from conserve_sgl.config import SloConfig
from conserve_sgl.errors import SettingError

__all__ = [
    "OfflineWork",
    "Settings",
    "batches_held",
    "batches_number",
    "is_setting",
    "offline_number",
    "slo_numbers",
]

_PREFIX = "conserve_"
_OFFLINE = f"{_PREFIX}offline"
_BATCHES = f"{_PREFIX}batches"
_OBJECTIVES = ("ttft", "tpot")
_UNITS = ("ms", "x")
_MOST = 10**12  # milliseconds, 31 years


class OfflineWork(IntEnum):
    """What happens to offline requests."""

    PAUSED = 0
    """They wait, those that ran too, and hold no row and no KV that others need."""
    RUNS = 1
    ENDS = 2
    """They are answered 503: the server stops. Nothing leads out of this one."""


class Settings(msgspec.Struct, frozen=True):
    """The settings of a server that runs."""

    slo: SloConfig
    offline: OfflineWork = OfflineWork.RUNS
    batches_held: bool = False

    @property
    def holds_offline(self) -> bool:
        """Whether offline requests must not run."""
        return self.offline is not OfflineWork.RUNS

    def changed_by(self, numbers: Mapping[str, float]) -> Settings:
        """These settings with `numbers`, by their names of the table above.

        Raises:
            SettingError: an unknown name, no number, or one that the configuration would not take.
        """
        slo, offline = msgspec.structs.asdict(self.slo), self.offline
        held = batches_held(numbers)
        for name, number in numbers.items():
            _check_number(name, number)
            key, _, unit = name.removeprefix(_PREFIX).rpartition("_")
            if name == _OFFLINE:
                offline = _offline(number)
            elif key in _OBJECTIVES and unit in _UNITS:
                slo[key] = f"{number:.10g}{unit}"
            elif name == f"{_PREFIX}yield_ms":
                slo["yield_ms"] = number
            elif name != _BATCHES:
                raise SettingError(f"{name} is no setting")
        if self.offline is OfflineWork.ENDS:
            offline = OfflineWork.ENDS
        return Settings(_checked(slo), offline, self.batches_held if held is None else held)


def _check_number(name: str, number: object) -> None:
    """It comes from a client, as whatever JSON knows."""
    is_number = isinstance(number, int | float) and not isinstance(number, bool)
    if not is_number or not abs(number) <= _MOST:
        raise SettingError(f"{name} is a number from -{_MOST} to {_MOST}")


def _offline(number: float) -> OfflineWork:
    try:
        return OfflineWork(number)
    except ValueError as e:
        raise SettingError(f"{_OFFLINE} is 0, 1 or 2, not {number}") from e


def _checked(slo: Mapping[str, object]) -> SloConfig:
    try:
        return msgspec.convert(slo, SloConfig)
    except msgspec.ValidationError as e:
        raise SettingError(f"slo: {e}") from e


def is_setting(name: str) -> bool:
    """Whether a name in `/set_internal_state` is one of ours; all others are SGLang's."""
    return name.startswith(_PREFIX)


def offline_number(work: OfflineWork) -> dict[str, float]:
    """What to send for offline work to run, pause or end."""
    return {_OFFLINE: int(work)}


def batches_number(*, held: bool) -> dict[str, float]:
    """What to send for the lines of batches to be held, or sent."""
    return {_BATCHES: int(not held)}


def batches_held(numbers: Mapping[str, float]) -> bool | None:
    """Whether `numbers` ask for batches to be held; None where they do not say.

    Raises:
        SettingError: they say something else.
    """
    if _BATCHES not in numbers:
        return None
    number = numbers[_BATCHES]
    if number not in (0, 1):
        raise SettingError(f"{_BATCHES} is 0 or 1")
    return number == 0


def slo_numbers(
    *, ttft: str | None = None, tpot: str | None = None, yield_ms: float | None = None
) -> dict[str, float]:
    """What to send for these objectives, which are written as in the configuration.

    Raises:
        SettingError: the configuration would not take one of them.
    """
    texts = {key: text for key, text in (("ttft", ttft), ("tpot", tpot)) if text is not None}
    times = {} if yield_ms is None else {"yield_ms": yield_ms}
    _checked({**texts, **times})
    numbers: dict[str, float] = {f"{_PREFIX}{key}": number for key, number in times.items()}
    for key, text in texts.items():
        unit = next(unit for unit in _UNITS if text.endswith(unit))
        numbers[f"{_PREFIX}{key}_{unit}"] = float(text.removesuffix(unit))
    return numbers
