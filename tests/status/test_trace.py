"""The Chrome trace of a recording."""

from __future__ import annotations

import json

import msgspec
import pytest

from conserve_sgl.status.fetch import Seen
from conserve_sgl.status.trace import chrome_trace
from status.examples import SERVER, changed, record_of, step


def look(endpoint: str, *seqs: int, **fields: object) -> Seen:
    return Seen(endpoint=endpoint, at_s=1.0, snapshot=record_of(*seqs, **fields))


def events(*looks: Seen, ph: str) -> list[dict]:
    trace = json.loads(msgspec.json.encode(chrome_trace(looks)))
    assert trace["displayTimeUnit"] == "ms"
    return [event for event in trace["traceEvents"] if event["ph"] == ph]


def test_every_step_is_one_event_at_its_time():
    (first, second) = events(look("a", 0, 1), look("a", 1), ph="X")
    assert (first["ts"], first["dur"]) == (pytest.approx(5000e6), pytest.approx(0.02e6))
    assert (first["args"]["step"], second["args"]["step"]) == (0, 1)
    assert first["args"]["bound"] == "slo.tpot"


def test_servers_are_processes_and_a_restart_counts_anew():
    again = look("a", 0, server=changed(SERVER, started_at_s=2000.0))
    steps = events(look("a", 0), look("b", 0), again, ph="X")
    assert [event["pid"] for event in steps] == [1, 2, 1]
    names = [e for e in events(look("a", 0), look("b", 0), ph="M") if e["name"] == "process_name"]
    assert [name["args"]["name"] for name in names] == ["a tiny", "b tiny"]


def test_yields_preemptions_and_arrivals_have_tracks_of_their_own():
    one = step(0, yields=1, preemptions=2, arrivals=3)
    seen = Seen(endpoint="a", at_s=1.0, snapshot=record_of(steps=(one,)))
    found = {event["name"]: event["args"]["count"] for event in events(seen, ph="i")}
    assert found == {"yields": 1, "preemptions": 2, "arrivals": 3}
    tracks = {e["args"]["name"]: e["tid"] for e in events(seen, ph="M") if "thread_n" in e["name"]}
    assert tracks == {"steps": 1, "yields": 2, "preemptions": 3, "arrivals": 4}
    assert {event["tid"] for event in events(seen, ph="i")} == {2, 3, 4}


def test_a_step_that_was_not_timed_counts_rows_and_is_no_span():
    one = step(0, seconds=None, online_rows=4)
    seen = Seen(endpoint="a", at_s=1.0, snapshot=record_of(steps=(one,)))
    assert events(seen, ph="X") == []
    (rows,) = events(seen, ph="C")
    assert rows["args"]["online"] == 4


def test_a_server_that_was_down_is_no_process():
    assert chrome_trace([Seen(endpoint="a", at_s=1.0, is_="down")])["traceEvents"] == []
