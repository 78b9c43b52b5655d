"""Pacing against a device with a clock of its own: no GPU takes part."""

from __future__ import annotations

import pytest

from conserve_sgl.engine.pacing import Pacer

LAUNCH_S = 0.001
POLL_S = 0.0001


class FakeDevice:
    """Runs what is queued one after the other, while the host's clock goes on.

    The host's clock moves only by what the host does: a launch, or a look at the socket.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.free_at_s = 0.0
        self.polls = 0
        self.most_outstanding = 0
        self._ends: list[float] = []

    def run(self, seconds: float) -> float:
        """Queue work; returns when it will have ended."""
        self.now_s += LAUNCH_S
        self.free_at_s = max(self.free_at_s, self.now_s) + seconds
        self._ends.append(self.free_at_s)
        outstanding = sum(end > self.now_s for end in self._ends)
        self.most_outstanding = max(self.most_outstanding, outstanding)
        return self.free_at_s

    def record(self):
        class Event:
            def __init__(self, device: FakeDevice, end_s: float) -> None:
                self._device, self._end_s = device, end_s

            def query(self) -> bool:
                return self._device.now_s >= self._end_s

        return Event(self, self.free_at_s)

    def poll(self) -> None:
        self.polls += 1
        self.now_s += POLL_S


def pacer(device: FakeDevice, depth: int, done: list) -> Pacer:
    return Pacer(
        record=device.record,
        depth=depth,
        clock=lambda: device.now_s,
        while_waiting=device.poll,
        on_done=lambda layers, seconds: done.append((layers, seconds)),
    )


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_host_is_never_more_than_depth_slices_ahead(depth):
    device = FakeDevice()
    paced = pacer(device, depth, [])
    for _ in range(20):
        paced.launch(lambda: device.run(0.005), layers=2)
    assert device.most_outstanding == depth
    assert device.polls > 100


@pytest.mark.parametrize(("depth", "idle_s"), [(1, 20 * LAUNCH_S), (2, LAUNCH_S)])
def test_two_outstanding_slices_keep_the_device_busy(depth, idle_s):
    device = FakeDevice()
    paced = pacer(device, depth, [])
    for _ in range(20):
        paced.launch(lambda: device.run(0.005), layers=2)
    paced.drain()
    assert device.free_at_s == pytest.approx(20 * 0.005 + idle_s, abs=20 * POLL_S)


def test_after_a_yield_the_device_is_done_within_depth_slices():
    device = FakeDevice()
    paced = pacer(device, 2, [])
    for _ in range(7):
        paced.launch(lambda: device.run(0.005), layers=2)
    arrived_s = device.now_s
    paced.drain()
    assert device.now_s >= device.free_at_s
    assert device.now_s - arrived_s <= 2 * 0.005 + POLL_S


def test_a_launch_that_finds_the_device_idle_is_counted():
    device = FakeDevice()
    paced = pacer(device, 2, [])
    paced.launch(lambda: device.run(0.005), layers=1)
    assert paced.host_stalls == 0  # nothing was to be kept busy before the first
    paced.launch(lambda: device.run(0.005), layers=1)
    assert paced.host_stalls == 0
    device.now_s += 1.0  # the host was away
    paced.launch(lambda: device.run(0.005), layers=1)
    assert paced.host_stalls == 1


def test_slices_are_timed_on_the_device_in_order():
    device, done = FakeDevice(), []
    paced = pacer(device, 2, done)
    for layers in (1, 2, 3):
        paced.launch(lambda n=layers: device.run(0.01 * n), layers=layers)
    paced.drain()
    assert [layers for layers, _ in done] == [1, 2, 3]
    for layers, seconds in done:
        assert seconds == pytest.approx(0.01 * layers, abs=2 * LAUNCH_S)


def test_what_is_forgotten_paces_nothing():
    device, done = FakeDevice(), []
    paced = pacer(device, 2, done)
    paced.launch(lambda: device.run(100.0), layers=1)
    paced.forget()
    paced.drain()
    assert device.polls == 0
    assert done == []


def test_a_synchronous_device_is_never_waited_for_and_never_stalls():
    clock, done = [0.0], []

    def run() -> str:
        clock[0] += 0.25
        return "output"

    paced = Pacer(
        record=None,
        depth=2,
        clock=lambda: clock[0],
        while_waiting=lambda: pytest.fail("nothing to wait for"),
        on_done=lambda layers, seconds: done.append((layers, seconds)),
    )
    assert paced.depth == 1
    assert [paced.launch(run, layers=3) for _ in range(2)] == ["output", "output"]
    assert done == [(3, 0.25), (3, 0.25)]
    assert paced.host_stalls == 0


def test_no_slice_at_all_cannot_run():
    with pytest.raises(ValueError, match="at least one slice"):
        pacer(FakeDevice(), 0, [])
