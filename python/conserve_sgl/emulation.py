"""Whether a server's device is emulated, which one it stands for, and how slowly its time runs."""

from __future__ import annotations

import os
from typing import Annotated

import msgspec

from conserve_sgl.errors import IncompatibleError

__all__ = ["DEVICE_ENV", "SCALE_ENV", "Emulation"]

DEVICE_ENV = "CONSERVE_EMULATED_DEVICE"
"""Names a device that is shipped, or the path of a device file; without it nothing is emulated."""

SCALE_ENV = "CONSERVE_EMULATED_TIME_SCALE"
"""How many seconds of the host a second of the device takes; 1 unless it is set."""


class Emulation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An emulated device.

    Args:
        device: name of a device that is shipped, or the path of a device file.
        time_scale: seconds of the host for a second of the device.
    """

    device: Annotated[str, msgspec.Meta(min_length=1)]
    time_scale: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 1.0

    @classmethod
    def from_environment(cls) -> Emulation | None:
        """None when no device is named.

        Raises:
            IncompatibleError: a time scale that is no number from 1 to 1000.
        """
        found = {"device": os.environ.get(DEVICE_ENV), "time_scale": os.environ.get(SCALE_ENV)}
        if not found["device"]:
            return None
        given = {key: text for key, text in found.items() if text}
        try:
            return msgspec.convert(given, cls, strict=False)
        except msgspec.ValidationError as e:
            raise IncompatibleError(f"{SCALE_ENV}={found['time_scale']}: {e}") from e

    def environment(self) -> dict[str, str]:
        """What a server is to find in its environment."""
        return {DEVICE_ENV: self.device, SCALE_ENV: f"{self.time_scale:g}"}
