"""Starts a server, or a job, as a process group of its own, and always stops it.

Only processes started here are ever signalled: each gets a session of its own, and the signals go
to that process group.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

from conserve_sgl.errors import ServerError

__all__ = [
    "ManagedProcess",
    "ServerProcess",
    "check_free",
    "free_port",
    "serving",
    "split_flags",
    "stop_on_signals",
]

_POLL_S = 0.1
_READY_S = 300.0


def free_port() -> int:
    """A port of the loopback interface that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_free(port: int) -> None:
    """Raise ServerError when something listens on a port of the loopback interface.

    It would answer in the place of the server that is to be started.
    """
    try:
        with socket.create_server(("127.0.0.1", port)):
            pass
    except OSError as e:
        raise ServerError(f"port {port} cannot be had: {os.strerror(e.errno)}") from e


class ManagedProcess:
    """A command in its own session, its output in a log file; a context manager that stops it.

    Args:
        argv: the command; never goes through a shell.
        log_path: gets stdout and stderr; overwritten.
        env: added to this process's environment.
        stop_signal: asks it to end.
        grace_s: how long after that the group gets SIGKILL.

    Raises (on start):
        ServerError: the command cannot be run.
    """

    def __init__(
        self,
        argv: Sequence[str],
        *,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        grace_s: float = 20.0,
    ) -> None:
        self.argv = list(argv)
        self.log_path = log_path
        self.env = {**os.environ, **(env or {})}
        self.stop_signal = stop_signal
        self.grace_s = grace_s
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the command; returns at once."""
        assert self._process is None, "started already"
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._process = self._popen()

    def _popen(self) -> subprocess.Popen[bytes]:
        with self.log_path.open("wb") as log:
            try:
                return subprocess.Popen(
                    self.argv,
                    env=self.env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as e:
                raise ServerError(f"cannot run {self.argv[0]}: {e.strerror}") from e

    @property
    def pid(self) -> int | None:
        """Of the command, and of its process group; None before it was started."""
        return None if self._process is None else self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs (or before it was started)."""
        return None if self._process is None else self._process.poll()

    def wait(self, timeout_s: float) -> int | None:
        """The exit status, or None when it still runs after `timeout_s`."""
        assert self._process is not None, "not started"
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> int | None:
        """Send the stop signal to the command, after `grace_s` SIGKILL to its whole group.

        The command gets to stop its own children in its own order: SGLang takes a scheduler that
        dies before it for a crash. Returns the command's exit status, None before start, when no
        process of the group is left. Safe to call again.
        """
        if self._process is None:
            return None
        if self._group_lives():
            try:
                self._process.send_signal(self.stop_signal)
                self._wait_for_group()
            finally:  # a second Ctrl-C must not leave anything behind
                self._signal(signal.SIGKILL)
        return self._process.wait()

    def log_tail(self, lines: int = 30) -> str:
        """The end of the log."""
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def _wait_for_group(self) -> None:
        deadline = time.monotonic() + self.grace_s
        while self._group_lives() and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _group_lives(self) -> bool:
        self._process.poll()  # reaps the leader: a zombie would keep its group alive
        return self._signal(0)

    def _signal(self, number: int) -> bool:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return False
        return True

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


class ServerProcess(ManagedProcess):
    """A managed process that answers HTTP on the loopback interface at `port`."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        port: int,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        grace_s: float = 20.0,
    ) -> None:
        super().__init__(argv, log_path=log_path, env=env, grace_s=grace_s)
        self.port = port

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_healthy(
        self,
        timeout_s: float,
        on_wait: Callable[[float], None] = lambda _: None,
    ) -> float:
        """Poll `/health` until it answers 200; the seconds that took.

        `on_wait` is called between polls with the seconds waited so far.

        Raises:
            ServerError: the process ended, or was not healthy in time; carries the log's end.
        """
        start_s = time.monotonic()
        while not self._healthy():
            waited_s = time.monotonic() - start_s
            if self.returncode is not None:
                raise self._failed(f"ended with status {self.returncode} before it was ready")
            if waited_s > timeout_s:
                raise self._failed(f"was not ready after {timeout_s:.0f} s")
            on_wait(waited_s)
            time.sleep(_POLL_S)
        return time.monotonic() - start_s

    def check(self) -> None:
        """Raise ServerError when the process has ended."""
        if self.returncode is not None:
            raise self._failed(f"ended with status {self.returncode}")

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.base_url}/health", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _failed(self, what: str) -> ServerError:
        return ServerError(
            f"the server {what}; the end of {self.log_path}:\n{self.log_tail()}\n"
            f"It was started with: {' '.join(self.argv)}"
        )


def split_flags(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """A command line before and after `--`: options of the command, and flags of SGLang.

    Args:
        argv: without the program's name; None is this process's.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


@contextmanager
def serving(
    model: Path,
    config: str,
    flags: Sequence[str],
    env: Mapping[str, str] | None = None,
    log_path: Path | None = None,
    *,
    ready_s: float = _READY_S,
) -> Iterator[ServerProcess]:
    """A `conserve serve` that is ready, for a measurement of its own.

    Args:
        model: its folder.
        config: YAML text of its configuration.
        flags: of SGLang.
        env: added to this process's environment.
        log_path: where its log is kept; None keeps none.
        ready_s: how long it may take to be.

    Raises:
        ServerError: it did not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        path, port = Path(folder, "conserve.yaml"), free_port()
        path.write_text(config, encoding="utf-8")
        server = ServerProcess(
            [
                *(sys.executable, "-m", "conserve_sgl.cli", "serve", f"--config={path}", "--"),
                *(f"--model-path={model}", f"--port={port}", *flags),
            ],
            port=port,
            log_path=log_path or Path(folder, "log"),
            env=env,
        )
        with server:
            server.wait_healthy(ready_s)
            yield server


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Let every ending run the clean-up, in a background shell (which ignores SIGINT) too."""

    def leave(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: leave,
        signal.SIGHUP: leave,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
