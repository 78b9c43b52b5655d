"""The arrival channel from one end to the other, over a real ipc socket.

Nothing here waits for a time: a loop polls until a message is there, within the test's timeout.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import pytest
import zmq

from conserve_sgl.engine.inbox import ArrivalInbox
from conserve_sgl.ingress.arrival import Arrival, ArrivalSender, arrival_endpoint

pytestmark = pytest.mark.timeout(30)

FORGET_AFTER_S = 1.0


@dataclass
class Clock:
    """The one clock of both ends."""

    now_ns: int = 10**9

    def monotonic_ns(self) -> int:
        return self.now_ns

    def pass_ms(self, ms: float) -> None:
        self.now_ns += int(ms * 1e6)


class Channel:
    """Two connected ends."""

    def __init__(self, endpoint: str) -> None:
        self.sender = ArrivalSender(endpoint)
        self.inbox = ArrivalInbox(endpoint, forget_after_s=FORGET_AFTER_S)
        # A PUSH socket drops while it has no peer; once it keeps one message, it keeps them all.
        dropped = -1
        while dropped != self.sender.dropped:
            dropped = self.sender.dropped
            self.sender.send(("hello",))
        self.receive(1)
        self.inbox.reached("hello")

    def receive(self, n: int) -> None:
        """Poll until `n` more messages have been read."""
        goal = self.inbox.received + n
        while self.inbox.received < goal:
            self.inbox.poll()

    def announce(self, *rids: str) -> None:
        self.sender.send(rids)
        self.receive(1)

    def close(self) -> None:
        self.sender.close()
        self.inbox.close()


@pytest.fixture
def endpoint(tmp_path, monkeypatch) -> str:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return arrival_endpoint("engine-1")


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("conserve_sgl.engine.inbox.time", clock)
    monkeypatch.setattr("conserve_sgl.ingress.arrival.time", clock)
    return clock


@pytest.fixture
def channel(endpoint, clock):  # noqa: ARG001  both ends read the clock
    channel = Channel(endpoint)
    yield channel
    channel.close()


def test_an_announced_request_is_arriving_until_it_is_there(channel):
    channel.announce("a")
    assert len(channel.inbox) == 1
    channel.inbox.reached("a")
    assert len(channel.inbox) == 0


def test_one_message_announces_all_prompts_of_a_request(channel):
    channel.announce("a", "b", "c")
    channel.inbox.reached("b")
    assert len(channel.inbox) == 2


def test_no_ids_make_no_message(channel):
    before = channel.inbox.received
    channel.sender.send(())
    channel.announce("a")
    assert channel.inbox.received == before + 1


def test_nothing_is_lost_and_nothing_comes_twice(channel):
    rids = [f"r{i}" for i in range(1000)]
    for rid in rids:
        channel.sender.send((rid,))
    channel.receive(len(rids))
    assert len(channel.inbox) == len(rids)
    for rid in rids:
        channel.inbox.reached(rid)
    assert len(channel.inbox) == 0


def test_the_latency_is_the_time_from_send_to_poll(channel, clock):
    channel.sender.send(("a",))
    clock.pass_ms(4.5)
    channel.receive(1)
    assert channel.inbox.latencies_ms()[-1] == pytest.approx(4.5)


def test_only_the_latest_latencies_are_kept(channel):
    for i in range(5000):
        channel.announce(f"r{i}")
        channel.inbox.reached(f"r{i}")
    assert channel.inbox.received == 5001
    assert len(channel.inbox.latencies_ms()) == 4096


def test_a_request_that_overtakes_its_announcement_is_not_arriving(channel):
    channel.inbox.reached("a")
    channel.announce("a")
    assert len(channel.inbox) == 0


def test_an_overtaking_request_cancels_one_announcement_only(channel):
    channel.inbox.reached("a")
    channel.announce("a")
    channel.announce("a")
    assert len(channel.inbox) == 1


def test_only_so_many_early_requests_are_remembered_the_latest_ones(channel):
    # Health checks reach the scheduler and are never announced.
    for i in range(1025):
        channel.inbox.reached(f"probe-{i}")
    channel.announce("probe-0")
    channel.announce("probe-1")
    assert len(channel.inbox) == 1


@pytest.mark.parametrize(
    ("waited_ms", "arriving"),
    [
        pytest.param(999, 1, id="still counts just before"),
        pytest.param(1000, 1, id="still counts at the limit"),
        pytest.param(1001, 0, id="is forgotten after it"),
    ],
)
def test_a_request_that_never_comes_is_forgotten(channel, clock, waited_ms, arriving):
    channel.announce("refused")
    clock.pass_ms(waited_ms)
    channel.inbox.poll()
    assert len(channel.inbox) == arriving


def test_only_the_overdue_are_forgotten(channel, clock):
    channel.announce("old")
    clock.pass_ms(600)
    channel.announce("new")
    clock.pass_ms(600)
    channel.inbox.poll()
    assert len(channel.inbox) == 1
    channel.inbox.reached("new")
    assert len(channel.inbox) == 0


def test_a_poll_with_nothing_there_returns(channel):
    channel.inbox.poll()
    assert len(channel.inbox) == 0


@pytest.mark.usefixtures("clock")
def test_a_sender_without_a_listener_drops_and_counts(endpoint):
    sender = ArrivalSender(endpoint)
    for i in range(100):
        sender.send((f"r{i}",))
    assert sender.dropped == 100
    sender.close()


def test_a_sender_whose_listener_does_not_read_drops_and_counts(channel):
    # Both ends' buffers hold a bounded number of messages; a send beyond that must not wait.
    sent = 0
    before = channel.sender.dropped
    while channel.sender.dropped == before:
        channel.sender.send((f"r{sent}",))
        sent += 1
    channel.receive(sent - 1)
    assert len(channel.inbox) == sent - 1


@pytest.mark.usefixtures("clock")
def test_a_listener_may_come_first(endpoint):
    inbox = ArrivalInbox(endpoint)
    inbox.poll()
    sender = ArrivalSender(endpoint)
    while not inbox.received:
        sender.send(("a",))
        inbox.poll()
    assert len(inbox) == 1
    sender.close()
    inbox.close()


@pytest.mark.usefixtures("clock")
def test_a_message_has_the_shape_that_both_ends_know(endpoint):
    pull = zmq.Context.instance().socket(zmq.PULL)
    pull.bind(endpoint)
    sender = ArrivalSender(endpoint)
    while not pull.poll(0):
        sender.send(("a", "b"))
    assert msgspec.msgpack.decode(pull.recv(), type=Arrival) == Arrival(("a", "b"), 10**9)
    pull.close(linger=0)
    sender.close()


def test_the_endpoint_of_a_real_instance_id_fits_an_ipc_path():
    # The kernel takes 107 bytes; SGLang's instance ids are 12 hexadecimal digits.
    assert len(arrival_endpoint("0" * 12).removeprefix("ipc://")) <= 107
