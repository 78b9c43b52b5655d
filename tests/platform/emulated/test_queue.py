"""The clock of an emulated device, against a host whose clock only moves when it is told to."""

from __future__ import annotations

import pytest

from conserve_sgl.platform.emulated.queue import DeviceQueue


class Host:
    """A clock that sleeping moves, and a device on it."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.slept_s: list[float] = []
        self.queue = DeviceQueue(lambda: self.now_s, self._sleep)
        self.classes = self.queue.classes

    def _sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)
        self.now_s += seconds

    def event(self, stream=None):
        event = self.classes.event()
        event.record(stream)
        return event


@pytest.fixture
def host() -> Host:
    return Host()


def test_a_launch_returns_at_once_and_its_result_is_there_later(host: Host) -> None:
    host.queue.compute(2.0)
    event = host.event()

    assert host.now_s == 100.0
    assert not event.query()
    event.synchronize()
    assert host.now_s == 102.0
    assert event.query()


def test_steps_run_one_after_the_other(host: Host) -> None:
    host.queue.compute(2.0)
    first = host.event()
    host.now_s += 0.5
    host.queue.compute(3.0)

    assert first.at_s == 102.0  # an event stands for what was there when it was recorded
    assert host.event().at_s == 105.0


def test_an_idle_device_begins_when_it_is_launched(host: Host) -> None:
    host.queue.compute(1.0)
    host.now_s += 10.0
    host.queue.compute(1.0)

    assert host.event().at_s == host.queue.free_s == 111.0


def test_a_launch_that_takes_the_host_longer_than_the_device_ends_with_it(host: Host) -> None:
    host.queue.compute(2.0)
    host.queue.launch_until(101.5)
    assert (host.now_s, host.queue.free_s) == (101.5, 102.0)
    host.queue.launch_until(103.0)
    assert (host.now_s, host.queue.free_s, host.event().at_s) == (103.0, 103.0, 103.0)


def test_what_is_past_lets_nobody_wait(host: Host) -> None:
    host.queue.compute(1.0)
    event = host.event()
    host.now_s += 1.0
    event.synchronize()
    host.classes.event().synchronize()  # never recorded
    host.classes.stream().synchronize()  # nothing on it
    host.queue.synchronize()

    assert host.slept_s == []


def test_computations_of_two_streams_take_turns(host: Host) -> None:
    other = host.classes.stream()
    host.queue.compute(2.0)
    with host.classes.context(other):
        host.queue.compute(1.0)

    assert other.done_s == 103.0
    assert host.queue.current.done_s == 102.0


def test_a_copy_runs_beside_a_computation_and_after_its_own_stream(host: Host) -> None:
    copies = host.classes.stream()
    host.queue.compute(5.0)
    with host.classes.context(copies):
        host.queue.copy(1.0)
        host.queue.copy(1.0)
    host.queue.compute(1.0)

    assert copies.done_s == 102.0
    assert host.queue.current.done_s == host.queue.free_s == 106.0


def test_a_stream_waits_for_another_and_for_an_event(host: Host) -> None:
    copies, results = host.classes.stream(), host.classes.stream(priority=0)
    with host.classes.context(copies):
        host.queue.copy(4.0)
    loaded = host.event(copies)
    loaded.wait()
    host.queue.compute(1.0)
    results.wait_stream(host.queue.current)

    assert host.queue.current.done_s == 105.0
    assert host.event(results).at_s == 105.0
    later = host.classes.stream()
    later.wait_event(results.record_event())
    assert later.done_s == 105.0
    assert not later.query()


def test_a_context_gives_the_stream_back_and_may_be_entered_again(host: Host) -> None:
    outer, inner = host.queue.current, host.classes.stream()
    context = host.classes.context(inner)
    with context:
        with context, host.classes.context(None):
            assert host.queue.current is inner
        assert host.queue.current is inner
    with pytest.raises(KeyError), context:
        raise KeyError
    assert host.queue.current is outer


def test_all_streams_are_waited_for(host: Host) -> None:
    with host.classes.context(host.classes.stream()):
        host.queue.copy(7.0)
    host.queue.compute(2.0)
    host.queue.synchronize()

    assert host.now_s == 107.0


def test_events_tell_milliseconds(host: Host) -> None:
    start = host.classes.event(enable_timing=True)
    host.queue.compute(1.0)
    start.record()
    host.queue.compute(0.25)
    end = host.event()

    assert start.elapsed_time(end) == pytest.approx(250.0)
    assert host.classes.event().elapsed_time(end) == 0.0


def test_a_sleep_that_ends_early_is_gone_on_with() -> None:
    now_s = [0.0]

    def sleep(seconds: float) -> None:
        now_s[0] += seconds / 2 if seconds > 0.1 else seconds

    queue = DeviceQueue(lambda: now_s[0], sleep)
    queue.compute(1.0)
    queue.synchronize()

    assert now_s[0] >= 1.0


def test_two_queues_have_nothing_to_do_with_each_other(host: Host) -> None:
    other = DeviceQueue(lambda: host.now_s, lambda _: None)
    host.queue.compute(3.0)

    assert other.current.query()
    assert isinstance(host.queue.current, host.classes.stream)
    assert not isinstance(host.queue.current, other.classes.stream)
