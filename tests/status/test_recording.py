"""Recordings: every step once, gaps said, and files that are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from conserve_sgl.errors import InputError
from conserve_sgl.status.ask import Ask
from conserve_sgl.status.fetch import Seen
from conserve_sgl.status.recording import Recorder, read_recording
from status.examples import RECORD, SERVER, changed, record_of

URL = "http://127.0.0.1:30000"


def seen(*seqs: int, at_s: float = 1.0, **fields: object) -> Seen:
    return Seen(endpoint=URL, at_s=at_s, snapshot=record_of(*seqs, **fields))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "night.jsonl"


def record(path: Path, *looks: Seen) -> list[int]:
    """Append the looks; the steps that were lost before each."""
    recorder = Recorder(path)
    lost = [recorder.append(look).lost_steps for look in looks]
    recorder.close()
    return lost


def test_a_server_is_asked_for_all_and_then_for_what_is_new(path):
    recorder = Recorder(path)
    assert recorder.which(URL) == Ask(since=None, most=None)
    recorder.append(seen(5, 6))
    assert recorder.which(URL) == Ask(since=7, most=None)
    recorder.append(Seen(endpoint=URL, at_s=2.0, is_="down", fault="gone"))
    assert recorder.which(URL) == Ask(since=7, most=None)
    assert recorder.which("http://other") == Ask(since=None, most=None)
    recorder.close()


def test_what_was_recorded_is_read_and_gone_on_with(path):
    record(path, seen(0, 1), seen(2, 3))
    assert Recorder(path).which(URL) == Ask(since=4, most=None)
    record(path, seen(4))
    steps = [step.seq for look in read_recording(path) for step in look.snapshot.steps]
    assert steps == [0, 1, 2, 3, 4]


def test_steps_that_the_server_no_longer_had_are_counted(path):
    assert record(path, seen(0, 1), seen(7, 8), seen(9), seen(next_step=10)) == [0, 5, 0, 0]
    assert [look.lost_steps for look in read_recording(path)] == [0, 5, 0, 0]


def test_a_server_that_started_anew_begins_anew(path):
    recorder = Recorder(path)
    recorder.append(seen(500))
    other = seen(server=changed(SERVER, pid=43))
    assert recorder.restarted(other)
    assert not recorder.restarted(seen(501))
    assert not recorder.restarted(Seen(endpoint=URL, at_s=1.0, is_="down"))
    recorder.restart(URL)
    assert recorder.which(URL) == Ask(since=None, most=None)
    assert recorder.append(seen(3, server=changed(SERVER, pid=43))).lost_steps == 0
    recorder.close()


def test_a_line_that_was_cut_off_is_left_out_and_written_over(path):
    record(path, seen(0), seen(1))
    path.write_bytes(path.read_bytes()[:-20])
    assert [look.snapshot.steps[0].seq for look in read_recording(path)] == [0]
    record(path, seen(1))
    assert [look.snapshot.steps[0].seq for look in read_recording(path)] == [0, 1]


def test_a_first_line_that_was_cut_off_is_nothing(path):
    path.write_bytes(b'{"endpoint": "http')
    with pytest.raises(InputError, match="there is nothing in it"):
        list(read_recording(path))
    record(path, seen(0))
    assert len(list(read_recording(path))) == 1


def test_a_file_that_is_no_recording_says_which_line(path):
    record(path, seen(0))
    with path.open("ab") as file:
        file.write(b'{"tea": 1}\n')
    with pytest.raises(InputError, match=r"night.jsonl:2: no line of a recording"):
        list(read_recording(path))
    with pytest.raises(InputError, match=r"night.jsonl:2"):
        Recorder(path)


def test_a_file_that_cannot_be_read_or_written_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        list(read_recording(tmp_path / "none"))
    with pytest.raises(InputError, match="cannot be written"):
        Recorder(tmp_path / "no" / "folder")
    with pytest.raises(InputError):
        Recorder(tmp_path)


def test_faults_and_names_survive(path):
    down = Seen(endpoint=URL, at_s=3.0, is_="down", fault="line\u2028break")
    record(path, Seen(endpoint=URL, at_s=2.0, snapshot=RECORD), down)
    assert list(read_recording(path))[1] == down
    assert len(path.read_text().splitlines()) == 2
