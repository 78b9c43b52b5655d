from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_sgl.errors import InputError, JobError
from conserve_sgl.jobs.output_folder import OutputFolder
from conserve_sgl.jobs.plan import lines, make_plan
from conserve_sgl.jobs.records import Failure, Record


def record(line: int, output: str = "o") -> Record:
    return Record(
        id=str(line),
        line=line,
        output=output,
        finish_reason="stop",
        prompt_tokens=1,
        completion_tokens=1,
        latency_s=0.1,
        done_unix_s=1e9,
        attempts=1,
    )


def finished(kept: OutputFolder, plan) -> set[str]:
    return kept.finished(plan.tasks[0], lambda _: None)


@pytest.fixture
def plan(folder, words):
    folder.data(words(20))
    return make_plan(folder.job())


@given(cuts=st.lists(st.floats(0, 1), max_size=6), output=st.text(max_size=20))
@settings(max_examples=25, deadline=None)
def test_whatever_the_crashes_each_line_is_there_once(cuts, output):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        (path / "data.jsonl").write_text("".join(f'{{"word": "{i}"}}\n' for i in range(20)))
        task = {"name": "words", "data": "data.jsonl", "prompt": "{{ word }}"}
        job = {"endpoints": ["http://h"], "output": str(path / "out"), "tasks": [task]}
        (path / "job.yaml").write_text(json.dumps(job))
        plan = make_plan(path / "job.yaml")
        results = path / "out" / "words.jsonl"
        for cut in [*cuts, None]:
            with OutputFolder(plan) as kept:
                done = finished(kept, plan)
                for line in lines(plan.tasks[0]):
                    if line.id not in done:
                        kept.add("words", record(line.line, output))
            if cut is not None:  # a crash leaves any beginning of the file
                os.truncate(results, int(cut * results.stat().st_size))
        ids = [json.loads(line)["id"] for line in results.read_bytes().splitlines()]
        assert sorted(ids, key=int) == [str(i) for i in range(1, 21)]


def test_a_torn_last_line_is_dropped_and_the_rest_kept(plan):
    with OutputFolder(plan) as kept:
        finished(kept, plan)
        kept.add("words", record(1))
        kept.add("words", record(2))
    path = plan.output / "words.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "3", "li')
    seen = []
    with OutputFolder(plan) as kept:
        assert kept.finished(plan.tasks[0], lambda r: seen.append(r.line)) == {"1", "2"}
    assert seen == [1, 2]
    assert path.read_bytes().count(b"\n") == 2
    assert path.read_bytes().endswith(b"\n")


def test_damage_inside_the_file_is_not_guessed_at(plan):
    with OutputFolder(plan) as kept:
        finished(kept, plan)
        kept.add("words", record(1))
    path = plan.output / "words.jsonl"
    path.write_bytes(b"\0\0\0\n" + path.read_bytes())
    with (
        OutputFolder(plan) as kept,
        pytest.raises(JobError, match=r"words.jsonl:1: damaged .*--fresh"),
    ):
        finished(kept, plan)


def test_a_repeated_id_is_refused(plan):
    with OutputFolder(plan) as kept:
        finished(kept, plan)
        kept.add("words", record(1))
        kept.add("words", record(1))
    with OutputFolder(plan) as kept, pytest.raises(JobError, match="id '1' is there twice"):
        finished(kept, plan)


def test_a_full_disk_leaves_whole_lines_and_a_clear_error(plan, monkeypatch):
    with OutputFolder(plan) as kept:
        finished(kept, plan)
        kept.add("words", record(1))
        path = plan.output / "words.jsonl"
        before = path.read_bytes()
        room = [10]  # bytes left on the device
        write = os.write

        def write_while_there_is_room(fd: int, data: bytes) -> int:
            if room[0] == 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = write(fd, data[: room[0]])
            room[0] -= taken
            return taken

        monkeypatch.setattr(os, "write", write_while_there_is_room)
        with pytest.raises(JobError, match=r"words.jsonl: No space left on device\. The finished"):
            kept.add("words", record(2))
        assert path.read_bytes() == before
        monkeypatch.undo()
        kept.add("words", record(2))
    with OutputFolder(plan) as kept:
        assert finished(kept, plan) == {"1", "2"}


def test_other_data_or_another_definition_is_refused_until_fresh(folder, words):
    folder.data(words(5))
    plan = make_plan(folder.job())
    with OutputFolder(plan) as kept:
        finished(kept, plan)
        kept.add("words", record(1))

    folder.data(words(6))
    with pytest.raises(
        JobError, match=r"made from other data than .*data.jsonl holds now.*--fresh"
    ):
        OutputFolder(make_plan(folder.job()))

    folder.data(words(5))
    for change in (
        {"task": {"prompt": "tell {{ word }}"}},
        {"task": {"sampling": {"temperature": 1}}},
        {"task": {"score": {"kind": "exact_match", "target": "x"}}},
        {"vars": {"x": 1}},
        {"model": "m"},
    ):
        with pytest.raises(JobError, match="another definition of the task words"):
            OutputFolder(make_plan(folder.job(**change)))

    changed = make_plan(folder.job(task={"prompt": "tell {{ word }}"}))
    with OutputFolder(changed, fresh=True) as kept:
        assert finished(kept, changed) == set()


def test_what_does_not_change_results_may_change(folder, words):
    folder.data(words(5))
    plan = make_plan(folder.job())
    with OutputFolder(plan) as kept:
        finished(kept, plan)
        kept.add("words", record(1))
    folder.data(words(5), "moved.jsonl")
    changed = make_plan(
        folder.job(
            task={"limit": 3, "data": "moved.jsonl"},
            endpoints=["http://elsewhere:1"],
            max_in_flight=1,
            name="again",
        )
    )
    with OutputFolder(changed) as kept:
        assert finished(kept, changed) == {"1"}


def test_a_file_that_no_job_made_is_never_touched(folder, words):
    folder.data(words(2))
    plan = make_plan(folder.job())
    plan.output.mkdir()
    theirs = plan.output / "words.jsonl"
    theirs.write_text("mine\n")
    for fresh in (False, True):
        with pytest.raises(JobError, match="no job made it"):
            OutputFolder(plan, fresh=fresh)
    assert theirs.read_text() == "mine\n"


def test_the_input_file_is_never_the_output_file(folder, words):
    folder.data(words(2), "words.jsonl")
    job = folder.job(task={"data": "words.jsonl"}, output=str(folder.path))
    with pytest.raises(InputError, match="output: results of words would be written over an input"):
        make_plan(job)


def test_failures_are_those_of_the_latest_run(plan):
    with OutputFolder(plan) as kept:
        finished(kept, plan)
        kept.add_failure("words", Failure(id="1", line=1, status=400, error="no", attempts=1))
    errors = plan.output / "words.errors.jsonl"
    assert json.loads(errors.read_text())["error"] == "no"
    with OutputFolder(plan) as kept:
        assert finished(kept, plan) == set()
    assert not errors.exists()


def test_an_unwritable_folder_is_a_job_error(plan):
    plan.output.write_text("a file")
    with pytest.raises(JobError, match=r"cannot write .*out: File exists. Nothing was sent"):
        OutputFolder(plan)


@pytest.mark.parametrize("name", ["words.jsonl", ".job.json.part", "words.errors.jsonl", ".lock"])
def test_a_file_that_cannot_be_written_is_found_before_anything_is_sent(plan, name):
    with OutputFolder(plan):
        pass
    (plan.output / name).unlink(missing_ok=True)
    (plan.output / name).mkdir()
    with (
        pytest.raises(JobError, match=r"cannot write .*\. Nothing was sent") as e,
        OutputFolder(plan) as kept,
    ):
        finished(kept, plan)
    assert str(plan.output / name) in str(e.value)


def test_an_error_file_that_cannot_be_made_leaves_what_is_done(plan):
    with OutputFolder(plan) as kept:
        finished(kept, plan)
        (plan.output / "words.errors.jsonl").mkdir()
        with pytest.raises(JobError, match="finished lines before this are kept"):
            kept.add_failure("words", Failure(id="1", line=1, status=400, error="no", attempts=1))
