"""The emulated device of this process: step times by a device file, on the clock of a queue."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache

import msgspec
import torch

from conserve_sgl.device.table import StepTimes, load_device
from conserve_sgl.emulation import Emulation
from conserve_sgl.errors import IncompatibleError
from conserve_sgl.platform.emulated.queue import DeviceQueue
from conserve_sgl.policy.latency import StepWork

__all__ = ["BUSY_METRIC", "EmulatedDevice", "the_device"]

BUSY_METRIC = "conserve:emulated_device_busy_seconds"
"""On `/metrics`, with `_total` behind it: host seconds in which a step had the device."""

_SEED = 0


class EmulatedDevice:
    """Steps, slices of layers and copies in the time of the real device, times `time_scale`.

    The host is held for as long as launching takes the real one, from the moment of the launch.

    Args:
        times: step times of the real device.
        time_scale: host seconds for a second of the device.
        queue: the clock.
        count_busy: told the seconds of each launch in which it, and nothing before it, has the
            device, waiting for loads and for the real host included.
    """

    def __init__(
        self,
        times: StepTimes,
        time_scale: float,
        queue: DeviceQueue,
        count_busy: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.spec = times.device
        self.queue = queue
        self._times = times
        self._scale = time_scale
        self._count_busy = count_busy

    @property
    def name(self) -> str:
        """Says that it is emulated, from which file and how slowly: a profile serves one alone."""
        table = hashlib.sha256(msgspec.json.encode(self.spec)).hexdigest()[:8]
        slower = "" if self._scale == 1 else f", {self._scale:g} times slower"
        return f"{self.spec.name} (emulated from {table}{slower})"

    def run_step(
        self,
        work: StepWork,
        before_layer: Callable[[int], object],
        *,
        repeated_context: int = 0,
    ) -> None:
        """Launch a step.

        Args:
            work: what it holds.
            before_layer: may let the current stream wait.
            repeated_context: tokens of the rows' contexts that another row of the step reads, too.
        """
        seconds = self._times.draw_s(work, repeated_context)
        layers = self.spec.layers
        launch_s = self._times.launch_s(work)
        self._run(range(layers), seconds / layers, launch_s / layers, before_layer)

    def run_slice(
        self, work: StepWork, layers: range, before_layer: Callable[[int], object]
    ) -> None:
        """Launch some layers of a prefill of `work`, without a graph."""
        layer_s = self._times.draw_layer_s(work)
        self._run(layers, layer_s, self.spec.eager_layer_s, before_layer)

    def copy(self, tokens: int, layers: float, *, to_host: bool = False) -> None:
        """Launch the copy of the KV of so many tokens and layers between device and host."""
        share = layers / self.spec.layers * self._scale
        self.queue.copy(self.spec.copy_s(tokens) * share)
        if to_host:
            self.queue.hold(self.spec.copy_holds_s * tokens * share)

    def _run(
        self,
        layers: range,
        layer_s: float,
        launch_s: float,
        before_layer: Callable[[int], object],
    ) -> None:
        layer_s, launch_s = layer_s * self._scale, launch_s * self._scale
        began_s, free_s = self.queue.now_s(), self.queue.free_s
        for layer in layers:
            before_layer(layer)
            self.queue.compute(layer_s)
        self.queue.launch_until(began_s + launch_s * len(layers))
        self._count_busy(self.queue.free_s - max(began_s, free_s))


@cache
def the_device() -> EmulatedDevice:
    """The device that the environment names, the same for the whole process.

    Raises:
        IncompatibleError: none is named.
        InputError: there is no such device, or its file cannot be used.
    """
    emulation = Emulation.from_environment()
    if emulation is None:
        raise IncompatibleError("no emulated device is named")
    times = StepTimes(load_device(emulation.device), seed=_SEED)
    return EmulatedDevice(times, emulation.time_scale, DeviceQueue(), _busy_counter())


def _busy_counter() -> Callable[[float], None]:
    # SGLang sets it for a server with --enable-metrics, before it starts its processes.
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return lambda _: None
    from prometheus_client import Counter

    return Counter(BUSY_METRIC, "Host seconds in which a step had the emulated device.").inc


def install(queue: DeviceQueue) -> None:
    """Make `torch.cpu` of this process a device that runs behind the host. Idempotent."""
    torch.cpu.Stream = queue.classes.stream
    torch.cpu.Event = queue.classes.event
    torch.cpu.StreamContext = torch.cpu.stream = queue.classes.context
    torch.cpu.current_stream = lambda device=None: queue.current  # noqa: ARG005
    torch.cpu.synchronize = lambda device=None: queue.synchronize()  # noqa: ARG005
