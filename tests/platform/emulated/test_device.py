"""An emulated device: whose times, how slow, in which order."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest

from conserve_sgl.device.table import StepTimes, load_device
from conserve_sgl.platform.emulated.device import EmulatedDevice
from conserve_sgl.platform.emulated.queue import DeviceQueue
from conserve_sgl.policy.latency import StepWork

LAYERS = 4
STEP_S, LAYER_S, COPY_S = 0.08, 0.03, 0.001
LAUNCH_S, EAGER_LAYER_S, REPEATED_S = 0.01, 0.005, 0.0001
WORK = StepWork.of([(100, 0)])


class Times:
    """Steps of a device whose every step takes the same."""

    device = SimpleNamespace(
        name="gpu",
        layers=LAYERS,
        copy_s=lambda tokens: tokens * COPY_S,
        eager_layer_s=EAGER_LAYER_S,
    )

    def __init__(self, launch_s: float = 0.0) -> None:
        self._launch_s = launch_s

    def launch_s(self, _work: StepWork) -> float:
        return self._launch_s

    def draw_s(self, _work: StepWork, repeated_context: int = 0) -> float:
        return STEP_S - REPEATED_S * repeated_context

    def draw_layer_s(self, _work: StepWork) -> float:
        return LAYER_S


class Host:
    """A clock that only waiting moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.queue = DeviceQueue(lambda: self.now_s, self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now_s += seconds


def device(
    scale: float = 1.0, count=lambda _: None, *, host: Host | None = None, launch_s: float = 0.0
) -> EmulatedDevice:
    return EmulatedDevice(Times(launch_s), scale, (host or Host()).queue, count)


def ran_s(device: EmulatedDevice, run) -> float:
    """By how much `run` moved the end of what the device does."""
    before_s = max(device.queue.current.done_s, 0.0)
    run()
    return device.queue.current.done_s - before_s


def no_wait(_layer: int) -> None:
    pass


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_everything_takes_the_device_s_time_times_the_scale(scale: float) -> None:
    counted: list[float] = []
    emulated = device(scale, counted.append)
    step_s = ran_s(emulated, lambda: emulated.run_step(WORK, no_wait))
    slice_s = ran_s(emulated, lambda: emulated.run_slice(WORK, range(1, 3), no_wait))
    copy_s = ran_s(emulated, lambda: emulated.copy(50, layers=2))

    assert step_s == pytest.approx(STEP_S * scale)
    assert slice_s == pytest.approx(2 * LAYER_S * scale)
    assert copy_s == pytest.approx(50 * COPY_S * 2 / LAYERS * scale)
    assert counted == pytest.approx([step_s, slice_s])


def test_a_step_waits_before_the_layer_whose_kv_is_being_loaded() -> None:
    emulated = device()
    loads = emulated.queue.classes.stream()
    loads.done_s = 1.0
    loaded = loads.record_event()

    def wait(layer: int) -> None:
        if layer == 2:
            loaded.wait()

    emulated.run_step(WORK, wait)

    # Two layers ran while it was loaded; the other two begin when it is there.
    assert emulated.queue.current.done_s == pytest.approx(1.0 + 2 * STEP_S / LAYERS)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_host_is_held_while_it_launches(scale: float) -> None:
    host = Host()
    emulated = device(scale, host=host, launch_s=LAUNCH_S)
    emulated.run_step(WORK, no_wait)

    assert host.now_s == pytest.approx(LAUNCH_S * scale)
    assert emulated.queue.current.done_s == pytest.approx(STEP_S * scale)
    emulated.run_slice(WORK, range(2), no_wait)
    assert host.now_s == pytest.approx((LAUNCH_S + 2 * EAGER_LAYER_S) * scale)


def test_a_step_is_not_over_before_all_of_it_was_launched() -> None:
    host, counted = Host(), []
    emulated = device(1.0, counted.append, host=host, launch_s=2.0)
    emulated.run_step(WORK, no_wait)
    host.now_s += 1.0
    emulated.run_step(WORK, no_wait)

    assert emulated.queue.current.done_s == host.now_s == pytest.approx(5.0)
    assert counted == pytest.approx([2.0, 2.0])  # the second in between, this host was late


def test_rows_that_share_a_prefix_read_it_cheaper() -> None:
    emulated = device()
    took_s = ran_s(emulated, lambda: emulated.run_step(WORK, no_wait, repeated_context=100))

    assert took_s == pytest.approx(STEP_S - 100 * REPEATED_S)


@pytest.mark.parametrize(("scale", "ending"), [(1.0, ")"), (2.5, ", 2.5 times slower)")])
def test_its_name_says_that_it_is_emulated_from_what_and_how_slowly(
    scale: float, ending: str
) -> None:
    h100 = load_device("h100-llama8b-triton")
    other = msgspec.structs.replace(h100, copy_bytes_per_s=1e9)
    queue = Host().queue
    name, another = (EmulatedDevice(StepTimes(d), scale, queue).name for d in (h100, other))

    assert name.startswith("h100-llama8b-triton (emulated from ")
    assert name.endswith(ending)
    assert another != name
    assert EmulatedDevice(StepTimes(h100), scale, queue).name == name
