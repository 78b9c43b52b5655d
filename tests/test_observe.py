"""What the scheduler sums up of its requests. No engine here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from conserve_sgl.engine.observe import (
    AcceptedLength,
    Observer,
    OnlineClock,
    RowCount,
    running_rows,
)
from conserve_sgl.policy.slo import Pace

PACE = Pace(tpot_s=0.1, unloaded_s=0.04, reserve_s=0.18)


def row(*, offline: bool = False, seqlen: int = 100, tokens: int = 1, first_s: float | None = 5.0):
    clock = OnlineClock(4.0)
    clock.first_s = first_s
    return SimpleNamespace(
        offline=offline,
        seqlen=seqlen,
        output_ids=[0] * tokens,
        finished_len=None,
        online_clock=clock,
        finished=lambda: False,
    )


def count_of(*rows, in_flight: int = 0) -> RowCount:
    count = RowCount(PACE, 10.0, lambda req: req.offline)
    count.add(rows, in_flight)
    return count


def test_rows_are_counted_by_class_with_the_token_in_flight():
    count = count_of(row(seqlen=10), row(seqlen=20), row(offline=True, seqlen=30), in_flight=1)
    assert (count.online.count, count.online.context_tokens) == (2, 32)
    assert (count.offline.count, count.offline.context_tokens) == (1, 31)


def test_the_earliest_token_is_due_first():
    late, early = row(tokens=20), row(tokens=10)
    assert count_of(late, early).online_due_s == PACE.next_due_s(5.0, 10)[0]
    assert count_of(late, early).online_late_s == PACE.next_due_s(5.0, 10)[1]


def test_a_first_token_in_flight_comes_now():
    assert count_of(row(tokens=0, first_s=None)).online_due_s == PACE.next_due_s(10.0, 1)[0]


def test_the_first_token_that_was_read_is_remembered():
    fresh = row(tokens=1, first_s=None)
    count_of(fresh)
    assert fresh.online_clock.first_s == 10.0


@pytest.mark.parametrize(("last", "in_flight"), [("decode", 3.0), ("prefill", 0.0), ("none", 0.0)])
def test_rows_of_a_step_in_flight_are_as_far_on_as_such_a_step_gives(last, in_flight):
    running = SimpleNamespace(reqs=[row(tokens=10, seqlen=100)])
    mode = SimpleNamespace(is_extend=lambda: last == "prefill")
    batch = None if last == "none" else SimpleNamespace(forward_mode=mode, reqs=[])
    count = RowCount(PACE, 10.0, lambda req: req.offline)
    running_rows(count, running, batch, None, overlap=True, step_tokens=3.0)
    assert count.online.context_tokens == 100 + in_flight
    assert count.online_due_s == PACE.next_due_s(5.0, 10 + in_flight)[0]


class TestAcceptedLength:
    def test_a_step_gives_one_token_until_more_is_seen(self):
        accepted = AcceptedLength(lambda req: req.offline)
        assert accepted.tokens == 1
        accepted.note([row(), row()], [2, 3])
        assert accepted.tokens == 3.5

    def test_it_follows_slowly(self):
        accepted = AcceptedLength(lambda req: req.offline)
        accepted.note([row()], [3])
        accepted.note([row()], [1])
        assert accepted.tokens == pytest.approx(3.9)

    def test_online_rows_count_where_there_are_any(self):
        accepted = AcceptedLength(lambda req: req.offline)
        accepted.note([row(offline=True), row()], [7, 1])
        assert accepted.tokens == 2
        accepted.note([], [])
        assert accepted.tokens == 2

    def test_else_offline_rows_do(self):
        accepted = AcceptedLength(lambda req: req.offline)
        accepted.note([row(offline=True), row(offline=True)], [7, 1])
        assert accepted.tokens == 5


class TestEnds:
    def test_a_request_got_its_first_token_and_then_the_others(self):
        clock = OnlineClock(4.0)
        clock.first_s = 4.5
        assert clock.end(6.5, 11) == pytest.approx((0.5, 0.2))

    def test_an_answer_of_one_token_has_no_time_between(self):
        assert OnlineClock(4.0).end(4.7, 1) == (pytest.approx(0.7), None)

    def test_it_is_told_once(self):
        clock = OnlineClock(4.0)
        assert clock.end(5.0, 1) is not None
        assert clock.end(5.0, 1) is None


class TestLatencies:
    """What online requests got, as it is noted of each step's results."""

    @pytest.fixture
    def told(self) -> list[tuple]:
        return []

    @pytest.fixture
    def observer(self, told) -> Observer:
        latencies = SimpleNamespace(
            decoded=lambda _now_s, rows: told.append(("decoded", rows)),
            first_token=lambda _now_s, ttft_s, goes_on: told.append(("first", goes_on, ttft_s > 0)),
            ended=lambda _now_s, tpot_s: told.append(("ended", tpot_s is not None)),
        )
        none = SimpleNamespace()
        return Observer(
            none,
            policy=SimpleNamespace(online_ended=lambda **_: None),
            live=none,
            intake=none,
            aside=none,
            memory=none,
            learning=none,
            is_offline=lambda req: req.offline,
            is_probe=lambda req: req.probe,
            latencies=latencies,
        )

    @staticmethod
    def req(*, ends: bool = False, aborts: bool = False, probe: bool = False, **known):
        made = row(**known)
        made.probe = probe
        made.finished = lambda: ends or aborts
        reason = {"type": "abort" if aborts else "stop"}
        made.finished_reason = SimpleNamespace(to_json=lambda: reason)
        return made

    def test_rows_that_decode_are_counted_once(self, observer, told):
        rows = [self.req(), self.req(tokens=9), self.req(offline=True)]
        observer.note_result(SimpleNamespace(reqs=rows))
        assert told == [("decoded", 2)]

    def test_a_first_token_comes_after_those_of_rows_that_ride_along(self, observer, told):
        fresh = self.req(first_s=None)
        observer.note_result(SimpleNamespace(reqs=[fresh, self.req()]))
        assert told == [("decoded", 1), ("first", True, True)]
        assert fresh.online_clock.first_s is not None

    def test_an_answer_of_one_token_ends_with_its_first(self, observer, told):
        observer.note_result(SimpleNamespace(reqs=[self.req(first_s=None, ends=True)]))
        assert told == [("ended", False), ("first", False, True)]

    def test_a_request_that_ended_is_not_counted_in_the_step_in_flight(self, observer, told):
        batch = SimpleNamespace(reqs=[self.req(tokens=5, ends=True)])
        observer.note_result(batch)
        assert told == [("ended", True), ("decoded", 1)]
        observer.note_result(batch)
        assert len(told) == 2

    def test_prompts_in_chunks_and_health_checks_got_nothing(self, observer, told):
        rows = [self.req(tokens=0, first_s=None), self.req(first_s=None, probe=True, ends=True)]
        observer.note_result(SimpleNamespace(reqs=rows))
        assert told == []

    def test_an_aborted_request_has_no_time_per_token(self, observer, told):
        observer.note_result(SimpleNamespace(reqs=[self.req(tokens=5, aborts=True)]))
        assert told == [("decoded", 1)]
