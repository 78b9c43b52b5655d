from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from conserve_sgl.bench.systems.server import ManagedProcess, ServerProcess, free_port, split_flags
from conserve_sgl.errors import ServerError

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("ready", child.pid, flush=True)
time.sleep(600)
"""
ORDERLY = """
import sys, time
print("ready", flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    sys.exit(7)
"""


def program(tmp_path: Path, code: str, **options: object) -> ManagedProcess:
    return ManagedProcess([sys.executable, "-c", code], log_path=tmp_path / "log", **options)


def wait_for(process: ManagedProcess, text: str) -> str:
    """The log, once it holds `text`; the test's own time limit ends a wait in vain."""
    while text not in process.log_tail():
        assert process.returncode is None, process.log_tail()
        time.sleep(0.01)
    return process.log_tail()


def fake_server(tmp_path: Path, script: Path, *arguments: str) -> ServerProcess:
    port = free_port()
    argv = [sys.executable, str(script), *(arguments or (str(port),))]
    return ServerProcess(argv, port=port, log_path=tmp_path / "logs" / "server.log")


def gone(pid: int) -> bool:
    """Whether `pid` has ended (an orphan may stay a zombie until init reaps it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].startswith("Z")
    except OSError:
        return True


def test_a_server_becomes_healthy_and_is_stopped(tmp_path: Path, fake_engine_path: Path) -> None:
    waits: list[float] = []
    with fake_server(tmp_path, fake_engine_path) as server:
        took_s = server.wait_healthy(60, waits.append)
        server.check()

    assert server.returncode is not None
    assert took_s >= max(waits, default=0.0)


def test_a_server_that_dies_at_start_is_reported_with_its_log(
    tmp_path: Path, fake_engine_path: Path
) -> None:
    with (
        fake_server(tmp_path, fake_engine_path, "not-a-port") as server,
        pytest.raises(ServerError, match=r"(?s)ended with status 1.*not-a-port"),
    ):
        server.wait_healthy(60)


def test_a_server_that_is_never_ready_is_reported(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", ORDERLY]
    with (
        ServerProcess(argv, port=free_port(), log_path=tmp_path / "log") as server,
        pytest.raises(ServerError, match="was not ready after 0 s"),
    ):
        server.wait_healthy(0.3)


def test_a_server_that_died_later_fails_the_check(tmp_path: Path, fake_engine_path: Path) -> None:
    with fake_server(tmp_path, fake_engine_path) as server:
        server.wait_healthy(60)
        os.kill(server.pid, signal.SIGKILL)
        server.wait(60)

        with pytest.raises(ServerError, match="ended with status -9"):
            server.check()


def test_a_command_that_does_not_exist_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="cannot run /no/such/program"):
        ManagedProcess(["/no/such/program"], log_path=tmp_path / "log").start()


def test_what_ignores_the_signal_is_killed_with_its_children(tmp_path: Path) -> None:
    with program(tmp_path, STUBBORN, grace_s=0.2) as process:
        child = int(wait_for(process, "ready").split()[1])

    assert process.returncode == -signal.SIGKILL
    while not gone(child):
        time.sleep(0.01)


def test_the_stop_signal_can_be_chosen_and_its_answer_is_kept(tmp_path: Path) -> None:
    process = program(tmp_path, ORDERLY, stop_signal=signal.SIGINT)
    process.start()
    wait_for(process, "ready")

    assert process.stop() == 7
    assert process.stop() == 7  # a second stop changes nothing


def test_it_is_stopped_when_the_body_fails(tmp_path: Path) -> None:
    process = program(tmp_path, ORDERLY)
    with pytest.raises(KeyboardInterrupt), process:
        raise KeyboardInterrupt

    assert process.returncode is not None


def test_the_environment_is_added_to(tmp_path: Path) -> None:
    code = "import os; print(os.environ['SPICE'], len(os.environ['PATH']) > 0)"
    with program(tmp_path, code, env={"SPICE": "saffron"}) as process:
        process.wait(60)

    assert process.log_tail() == "saffron True"


@pytest.mark.parametrize(
    ("argv", "ours", "theirs"),
    [
        ([], [], []),
        (["--model", "m"], ["--model", "m"], []),
        (["--model", "m", "--", "--tp-size=2"], ["--model", "m"], ["--tp-size=2"]),
        (["--", "--a", "--", "--b"], [], ["--a", "--", "--b"]),
    ],
)
def test_flags_of_sglang_stand_behind_two_dashes(argv, ours, theirs):
    assert split_flags(argv) == (ours, theirs)
