"""What a step holds, and how its time is told apart from its neighbours'. No engine here."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from conserve_sgl.engine.step_meter import StepMeter, work_of
from conserve_sgl.policy.latency import StepWork


@dataclass
class Mode:
    name: str

    def is_extend(self) -> bool:
        return self.name != "decode"

    def is_mixed(self) -> bool:
        return self.name == "mixed"


@dataclass
class Lengths:
    of: list[int]

    def sum(self) -> int:
        return sum(self.of)


def decode(*contexts: int) -> SimpleNamespace:
    return SimpleNamespace(
        forward_mode=Mode("decode"), reqs=[object()] * len(contexts), seq_lens_cpu=Lengths(contexts)
    )


def prefill(*prompts: tuple[int, int], riding: tuple[int, ...] = ()) -> SimpleNamespace:
    """A batch of (new, resident) prompts, and of decode rows that end at `riding` tokens."""
    return SimpleNamespace(
        forward_mode=Mode("mixed" if riding else "extend"),
        extend_lens=[new for new, _ in prompts] + [1] * len(riding),
        prefix_lens=[resident for _, resident in prompts] + [end - 1 for end in riding],
        decoding_reqs=[object()] * len(riding),
    )


@pytest.mark.parametrize(
    ("batch", "work"),
    [
        (decode(10, 20), StepWork.of((), [10, 20])),
        (prefill((5, 0), (7, 100)), StepWork.of([(5, 0), (7, 100)])),
        (prefill((5, 0), riding=(30, 40)), StepWork.of([(5, 0)], [30, 40])),
    ],
)
def test_work_of_a_batch(batch, work):
    assert work_of(batch) == work


def test_rows_left_from_an_earlier_mixed_step_do_not_count_in_a_plain_one():
    batch = prefill((5, 0))
    batch.decoding_reqs = [object()]
    assert work_of(batch) == StepWork.of([(5, 0)])


@dataclass
class Clock:
    now_s: float = 0.0
    meter_calls: list = field(default_factory=list)

    def __call__(self) -> float:
        return self.now_s

    def at(self, now_s: float) -> None:
        self.now_s = now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def times(samples: list) -> list[float]:
    return [sample.seconds for sample in samples]


class TestSerial:
    @pytest.fixture
    def meter(self, clock: Clock) -> StepMeter:
        return StepMeter(None, clock=clock)

    def test_a_step_lasts_until_the_next_one_starts(self, meter, clock):
        assert meter.started(decode(10)) == []
        clock.at(3.0)
        assert meter.finished() == []
        clock.at(4.0)
        (sample,) = meter.started(prefill((5, 0)))
        assert (sample.work, sample.seconds) == (StepWork.of((), [10]), 4.0)

    def test_time_without_anything_to_run_belongs_to_no_step(self, meter, clock):
        meter.started(decode(10))
        clock.at(4.0)
        assert times(meter.started(None)) == [4.0]
        clock.at(100.0)
        assert meter.started(decode(10)) == []
        clock.at(103.0)
        assert times(meter.started(None)) == [3.0]
        assert meter.started(None) == []

    def test_a_step_across_a_pause_is_left_out(self, meter, clock):
        meter.started(decode(10))
        meter.forget()
        clock.at(1000.0)
        assert meter.started(decode(11)) == []
        clock.at(1001.0)
        assert times(meter.started(None)) == [1.0]

    def test_a_part_of_a_step_is_left_out_and_its_time_is_not_the_next_one_s(self, meter, clock):
        meter.started(prefill((5, 0)))
        meter.skip()
        clock.at(4.0)
        assert meter.started(decode(10)) == []
        clock.at(7.0)
        assert times(meter.started(None)) == [3.0]


class Device:
    """A stream whose end the tests set; a mark remembers where it was."""

    def __init__(self) -> None:
        self.done_s = 0.0
        self.waited_for: list[float] = []

    def mark(self) -> DeviceMark:
        return DeviceMark(self, self.done_s)


@dataclass
class DeviceMark:
    device: Device
    at_s: float

    def synchronize(self) -> None:
        self.device.waited_for.append(self.at_s)

    def elapsed_time(self, end: DeviceMark) -> float:
        return 1e3 * (end.at_s - self.at_s)


class TestOverlapped:
    @pytest.fixture
    def device(self) -> Device:
        return Device()

    @pytest.fixture
    def meter(self, clock: Clock, device: Device) -> StepMeter:
        return StepMeter(device.mark, clock=clock)

    @pytest.fixture
    def launch(self, meter, device):
        def launch(batch, *, ends_s: float) -> None:
            meter.started(batch)
            device.done_s = ends_s
            meter.launched()

        return launch

    def test_a_step_lasts_from_the_end_of_the_one_before_it(self, meter, launch):
        # Launches run one step ahead of the device, which takes 10 s for each.
        launch(decode(1), ends_s=10.0)
        launch(decode(2), ends_s=20.0)
        assert times(meter.finished()) == [10.0]
        launch(decode(3), ends_s=30.0)
        (second,) = meter.finished()
        assert (second.work, second.seconds) == (StepWork.of((), [2]), 10.0)

    def test_what_the_host_needs_to_launch_a_step_belongs_to_that_step(self, meter, clock, launch):
        """And not to the one before it, whose result is handled only after that."""
        launch(decode(1), ends_s=10.0)
        clock.at(25.0)  # the host launched until now; the device was idle from 10 on
        launch(prefill((5, 0)), ends_s=27.0)
        assert times(meter.finished()) == [10.0]
        clock.at(27.0)
        assert times(meter.finished()) == [17.0]

    def test_a_step_launched_on_an_idle_device_lasts_from_its_start(
        self, meter, clock, device, launch
    ):
        launch(decode(1), ends_s=10.0)
        clock.at(10.0)
        meter.finished()
        meter.started(None)
        clock.at(50.0)
        device.done_s = 50.0  # where an idle stream's mark is
        launch(decode(2), ends_s=58.0)
        assert times(meter.finished()) == [8.0]

    def test_it_waits_for_no_more_than_the_step_whose_result_was_handled(
        self, meter, device, launch
    ):
        launch(decode(1), ends_s=10.0)
        launch(decode(2), ends_s=20.0)
        meter.finished()
        assert device.waited_for == [10.0]

    def test_a_result_without_a_step_is_nothing(self, meter):
        assert meter.finished() == []

    def test_steps_across_a_pause_are_left_out(self, meter, clock, launch):
        launch(decode(1), ends_s=10.0)
        launch(decode(2), ends_s=20.0)
        meter.forget()
        clock.at(1000.0)
        assert meter.finished() == []

    def test_a_step_after_a_pause_lasts_from_its_start(self, meter, device, launch):
        launch(decode(1), ends_s=10.0)
        meter.finished()
        meter.forget()
        device.done_s = 1000.0
        launch(decode(2), ends_s=1007.0)
        assert times(meter.finished()) == [7.0]

    def test_a_part_of_a_step_is_left_out(self, meter, launch):
        launch(decode(1), ends_s=10.0)
        launch(prefill((5, 0)), ends_s=13.0)
        meter.skip()
        assert meter.busy_until_s(lambda _work: 2.0) == 2.0
        assert times(meter.finished()) == [10.0]
        assert meter.finished() == []
