"""The command line, as far as it goes without starting a server."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import conserve_sgl
from conserve_sgl import cli, compat
from conserve_sgl.config import CONFIG_ENV
from conserve_sgl.errors import IncompatibleError, InputError

CHECKOUT = Path(__file__).resolve().parent.parent
GOOD = CHECKOUT / "configs" / "serve" / "default.yaml"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    for name in (CONFIG_ENV, compat.ALLOW_UNTESTED_ENV, "SGLANG_RUST_SERVER", "SGLANG_PLUGINS"):
        # setenv before delenv: what a command sets is undone after the test.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def bad(tmp_path) -> Path:
    path = tmp_path / "bad.yaml"
    path.write_text("offline:\n  queue: 3\n")
    return path


@pytest.fixture
def executed(monkeypatch) -> list[list[str]]:
    """The command lines that would have replaced this process."""
    calls: list[list[str]] = []

    def execv(program: str, arguments: list[str]) -> None:
        assert program == sys.executable
        calls.append(arguments)

    monkeypatch.setattr(os, "execv", execv)
    return calls


def run(*arguments: str):
    return CliRunner().invoke(cli.app, list(arguments))


def run_main(monkeypatch, *arguments: str) -> int:
    """The exit code of the installed command."""
    monkeypatch.setattr(sys, "argv", ["conserve", *arguments])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


def test_version():
    result = run("--version")
    assert (result.exit_code, result.stdout) == (0, f"conserve-sgl {conserve_sgl.__version__}\n")


def test_without_a_command_it_shows_the_commands():
    output = run().output
    assert "serve" in output
    assert "doctor" in output


def test_an_unknown_command_is_an_error():
    result = run("sevre")
    assert result.exit_code == 2
    assert "sevre" in result.output


@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "inf", "1e300"])
def test_a_time_that_is_none_is_bad_input(monkeypatch, capsys, tmp_path, seconds):
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    assert run_main(monkeypatch, "run-batch", *files, "--request-timeout-s", seconds) == 2
    assert "--request-timeout-s: must be above 0" in capsys.readouterr().err


def test_a_key_that_cannot_be_sent_is_bad_input(tmp_path):
    files = ["-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]
    result = run("run-batch", *files, "--api-key", "a\nb")
    assert result.exit_code == 2
    assert "line break" in result.output


# -------------------------------------------------------------------- serve


def test_serve_passes_every_flag_on_and_names_the_configuration(executed):
    flags = ["--model-path", "m", "--tp", "1", "--config", "sglang.yaml", "--disable-radix-cache"]
    assert run("serve", "--config", str(GOOD), "--", *flags).exit_code == 0
    ((*start, last), passed) = executed[0][: -len(flags)], executed[0][-len(flags) :]
    assert start[0] == sys.executable
    assert last == "serve"
    assert passed == flags
    assert os.environ[CONFIG_ENV] == str(GOOD)


def test_serve_names_the_configuration_by_its_whole_path(executed, monkeypatch):
    monkeypatch.chdir(GOOD.parent)
    assert run("serve", "--config", GOOD.name).exit_code == 0
    assert os.environ[CONFIG_ENV] == str(GOOD)
    assert len(executed) == 1


def test_serve_takes_the_configuration_from_the_environment(executed, monkeypatch):
    monkeypatch.setenv(CONFIG_ENV, str(GOOD))
    assert run("serve", "--", "--model-path", "m").exit_code == 0
    assert executed[0][-2:] == ["--model-path", "m"]


def test_serve_without_a_configuration_says_how_to_give_one(executed):
    result = run("serve", "--", "--model-path", "m")
    assert result.exit_code == 2
    assert "--config FILE" in result.output
    assert CONFIG_ENV in result.output
    assert executed == []


def test_serve_with_a_bad_configuration_says_where(executed, bad):
    result = run("serve", "--config", str(bad))
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith(f"{bad}:2: offline.queue: unknown key; there are")
    assert executed == []


def test_serve_on_a_version_that_was_not_tested(executed, monkeypatch):
    monkeypatch.setattr(compat, "version", lambda _name: "0.4.0")
    assert isinstance(run("serve", "--config", str(GOOD)).exception, IncompatibleError)
    assert executed == []


def test_serve_with_the_rust_server(executed, monkeypatch):
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    assert isinstance(run("serve", "--config", str(GOOD)).exception, IncompatibleError)
    assert executed == []


def test_the_command_puts_an_error_of_ours_on_one_line_of_stderr(monkeypatch, capsys, bad):
    assert run_main(monkeypatch, "serve", "--config", str(bad)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    known = "queue_requests, take, retry_after_s, no_deadline_share and min_share"
    assert captured.err == f"conserve: {bad}:2: offline.queue: unknown key; there are {known}\n"


def test_an_error_with_brackets_is_shown_as_it_is(monkeypatch, capsys, tmp_path):
    path = tmp_path / "a[red]b.yaml"
    assert run_main(monkeypatch, "serve", "--config", str(path)) == 2
    assert "a[red]b.yaml: cannot be read" in capsys.readouterr().err


def test_the_command_ends_with_0(monkeypatch, capsys):
    assert run_main(monkeypatch, "--version") == 0
    assert conserve_sgl.__version__ in capsys.readouterr().out


# ------------------------------------------------------------------- doctor


def test_doctor_on_a_bad_configuration_ends_with_1_and_says_where(bad):
    result = run("doctor", "--config", str(bad))
    assert result.exit_code == 1
    assert "offline.queue: unknown key" in result.output
    assert "would not start" in result.output


def test_doctor_takes_the_configuration_from_the_environment(monkeypatch, bad):
    monkeypatch.setenv(CONFIG_ENV, str(bad))
    assert run("doctor").exit_code == 1


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        pytest.param("SGLANG_RUST_SERVER", "1", "SGLANG_RUST_SERVER", id="the Rust server"),
        pytest.param("SGLANG_PLUGINS", "other, another", "leaves conserve out", id="allow-list"),
    ],
)
def test_doctor_finds_an_environment_that_keeps_conserve_out(monkeypatch, variable, value, said):
    monkeypatch.setenv(variable, value)
    result = run("doctor", "--config", str(GOOD))
    assert result.exit_code == 1
    assert said in result.output


def test_doctor_finds_a_version_that_was_not_tested(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda _name: "0.4.0")
    result = run("doctor", "--config", str(GOOD))
    assert result.exit_code == 1
    assert "SGLang 0.4.0 was not tested" in result.output


def test_doctor_reports_every_fault_at_once(monkeypatch, bad):
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    output = run("doctor", "--config", str(bad)).output
    assert "configuration" in output
    assert "environment" in output


# ------------------------------------------------------------------ profile


@pytest.fixture
def stored(tmp_path, monkeypatch) -> Path:
    """A profile in the folder of profiles."""
    from datetime import UTC, datetime

    from conserve_sgl.profile import DIR_ENV, Profile, ProfileStore
    from support.profiles import IDENTITY, steps

    monkeypatch.setenv(DIR_ENV, str(tmp_path / "profiles"))
    measured_at = datetime(2026, 1, 2, tzinfo=UTC)
    samples = tuple(steps())
    return ProfileStore.of_environment().save(
        Profile(identity=IDENTITY, measured_at=measured_at, layers=2, samples=samples)
    )


@pytest.mark.parametrize("named", [[], ["--", "--model-path=some/Model-1B"]])
def test_profile_show_prints_costs_and_draws(stored, named):
    result = run("profile", "--show", *named)
    assert result.exit_code == 0, result.output
    assert "What a step costs" in result.stdout
    assert str(stored.with_suffix(".png")) in result.stdout
    assert stored.with_suffix(".png").is_file()


def test_profile_show_takes_a_file_and_a_name_for_the_picture(stored, tmp_path, monkeypatch):
    monkeypatch.setenv("CONSERVE_PROFILE_DIR", str(tmp_path / "empty"))
    picture = tmp_path / "picture.png"
    result = run("profile", "--show", "--plot", str(picture), str(stored))
    assert result.exit_code == 0, result.output
    assert picture.is_file()
    assert not stored.with_suffix(".png").exists()


def test_profile_check_predicts_a_log_of_steps(stored, tmp_path):
    from conserve_sgl.profile.steps import STEP_LOG_ENV, StepLog
    from support.profiles import steps

    log = StepLog.of_environment({STEP_LOG_ENV: str(tmp_path / "steps.jsonl")})
    for step in steps():
        log.write(step)
    log.close()
    result = run("profile", "--check", str(tmp_path / "steps.jsonl"))
    assert result.exit_code == 0, result.output
    assert "By the profile alone" in result.stdout
    assert stored.with_suffix(".png").is_file()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--show", "--", "--model-path=none/such"], "no profile of none/such"),
        (["--show", "not-there.json"], "cannot be read"),
        (["--check", "not-there.jsonl"], "cannot be read"),
    ],
)
@pytest.mark.usefixtures("stored")
def test_profile_of_nothing_is_bad_input(arguments, why, monkeypatch, capsys):
    assert run_main(monkeypatch, "profile", *arguments) == 2
    assert why in capsys.readouterr().err


def test_profile_of_a_corrupt_file_is_bad_input(stored, monkeypatch, capsys):
    stored.write_text("{")
    assert run_main(monkeypatch, "profile", "--show") == 2
    assert str(stored) in capsys.readouterr().err


def test_profile_refuses_a_bad_configuration_before_it_starts_anything(bad, monkeypatch, capsys):
    assert run_main(monkeypatch, "profile", "--config", str(bad), "--", "--port=1") == 2
    assert f"{bad}:2" in capsys.readouterr().err


def test_profile_says_why_a_server_did_not_start(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_SGLANG_SERVE", [sys.executable, "-c", "raise SystemExit('no GPU')"])
    assert run_main(monkeypatch, "profile", "--config", str(GOOD), "--", "--model-path=m") == 1
    assert "no GPU" in capsys.readouterr().err
