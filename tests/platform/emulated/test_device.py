"""An emulated device: whose times, how slow, in which order."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from conserve_sgl.platform.emulated.device import EmulatedDevice
from conserve_sgl.platform.emulated.queue import DeviceQueue
from conserve_sgl.policy.latency import StepWork

LAYERS = 4
STEP_S, FIRST_S, LAYER_S, COPY_S = 0.08, 0.4, 0.03, 0.001
WORK = StepWork.of([(100, 0)])


class Times:
    """Steps of a device whose every step takes the same."""

    device = SimpleNamespace(name="gpu", layers=LAYERS, copy_s=lambda tokens: tokens * COPY_S)

    def draw_s(self, _work: StepWork) -> float:
        return STEP_S

    def first_s(self, _work: StepWork) -> float:
        return FIRST_S

    def draw_layer_s(self, _work: StepWork) -> float:
        return LAYER_S


def device(scale: float = 1.0, count=lambda _: None) -> EmulatedDevice:
    return EmulatedDevice(Times(), scale, DeviceQueue(lambda: 0.0, lambda _: None), count)


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
    first_s = ran_s(emulated, lambda: emulated.run_step(WORK, no_wait))
    step_s = ran_s(emulated, lambda: emulated.run_step(WORK, no_wait))
    slice_s = ran_s(emulated, lambda: emulated.run_slice(WORK, range(1, 3), no_wait))
    copy_s = ran_s(emulated, lambda: emulated.copy(50, layers=2))

    assert first_s == pytest.approx(FIRST_S * scale)
    assert step_s == pytest.approx(STEP_S * scale)
    assert slice_s == pytest.approx(2 * LAYER_S * scale)
    assert copy_s == pytest.approx(50 * COPY_S * 2 / LAYERS * scale)
    assert counted == pytest.approx([first_s, step_s, slice_s])


def test_a_shape_is_new_once_and_another_one_again() -> None:
    emulated = device()
    works = [WORK, StepWork.of([(101, 7)]), StepWork.of([(600, 0)]), StepWork.of((), [9]), WORK]
    took = [ran_s(emulated, lambda w=work: emulated.run_step(w, no_wait)) for work in works]

    assert took == pytest.approx([FIRST_S, STEP_S, FIRST_S, FIRST_S, STEP_S])


def test_a_step_waits_before_the_layer_whose_kv_is_being_loaded() -> None:
    emulated = device()
    emulated.run_step(WORK, no_wait)
    loads = emulated.queue.classes.stream()
    loads.done_s = 1.0
    loaded = loads.record_event()

    def wait(layer: int) -> None:
        if layer == 2:
            loaded.wait()

    emulated.run_step(WORK, wait)

    # Two layers ran while it was loaded; the other two begin when it is there.
    assert emulated.queue.current.done_s == pytest.approx(1.0 + 2 * STEP_S / LAYERS)


def test_its_name_says_that_it_is_emulated_and_how_slow() -> None:
    assert device().name == "gpu (emulated)"
    assert device(2.5).name == "gpu (emulated, 2.5 times slower)"
