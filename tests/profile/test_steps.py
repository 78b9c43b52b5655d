"""Logs of steps: written line by line, read with their errors named, and used to judge a model."""

from __future__ import annotations

import msgspec
import pytest

from conserve_sgl.errors import InputError
from conserve_sgl.policy.latency import StepKind
from conserve_sgl.profile.steps import STEP_LOG_ENV, StepLog, held_out, read_steps
from support.profiles import steps


@pytest.fixture
def log(tmp_path):
    return tmp_path / "steps.jsonl"


def write(path) -> None:
    written = StepLog.of_environment({STEP_LOG_ENV: str(path)})
    for sample in steps():
        written.write(sample)
    written.close()


def test_what_is_written_is_read(log):
    write(log)
    assert read_steps(log) == steps()


def test_a_second_server_appends(log):
    write(log)
    write(log)
    assert read_steps(log) == steps() * 2


def test_without_the_variable_nothing_is_written(tmp_path):
    StepLog.of_environment({}).write(steps()[0])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        StepLog.of_environment({STEP_LOG_ENV: str(tmp_path / "none" / "steps")})


def test_a_last_line_that_was_cut_off_is_left_out(log):
    write(log)
    log.write_bytes(log.read_bytes()[:-5])
    assert read_steps(log) == steps()[:-1]


def test_a_line_that_is_no_step_is_refused_with_its_number(log):
    write(log)
    log.write_bytes(log.read_bytes() + b"{}\n")
    with pytest.raises(InputError) as caught:
        read_steps(log)
    assert caught.value.line == len(steps()) + 1


@pytest.mark.parametrize("content", [None, b"", b"{"])
def test_a_log_without_steps_is_refused(log, content):
    if content is not None:
        log.write_bytes(content)
    with pytest.raises(InputError):
        read_steps(log)


def test_a_machine_that_is_as_measured_is_predicted(profile):
    checked = held_out(profile.model(), steps(), learn=False)
    assert set(checked.errors) == {StepKind.PREFILL, StepKind.DECODE}
    assert checked.all.steps == len(steps())
    assert checked.all.p95 < 0.01


def test_learning_as_it_goes_beats_the_profile_on_a_machine_that_became_slower(profile):
    slower = steps(slower=1.5) * 60
    alone = held_out(profile.model(), slower, learn=False)
    learning = held_out(profile.model(), slower, learn=True)
    assert alone.all.median == pytest.approx(0.5, abs=0.02)
    assert alone.under_upper < 0.1
    assert learning.all.median < 0.1
    assert learning.under_upper > 0.5


def test_judging_does_not_teach(profile):
    model = profile.model()
    held_out(model, steps(slower=2.0) * 60, learn=False)
    assert model.coefficients == profile.model().coefficients
    assert msgspec.structs.astuple(model.errors()) == msgspec.structs.astuple(
        profile.model().errors()
    )
