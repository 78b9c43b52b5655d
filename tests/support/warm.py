"""Processes that have imported SGLang already: forks of one that has done nothing else.

A server is three processes, and each imports SGLang for 10 s. What a fork has is modules, no more:
the plugins of SGLang are loaded, and its hooks applied, in every process as they always are. What
`multiprocessing` spawns in a fork, SGLang's scheduler and detokenizer, becomes of a fork as well,
made before anything else happened in it.

Modules read the environment when they are imported: a server comes from a process that has all its
variables that begin with `SGLANG_`, and its device.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import json
import multiprocessing.util
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from conserve_sgl.bench.systems.server import ServerProcess
from conserve_sgl.emulation import DEVICE_ENV
from conserve_sgl.platform import NAME, SPIN_COUNT

IMPORTS = (
    "sglang.cli.main",
    "sglang.cli.serve",
    "sglang.launch_server",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.models.registry",
)
SPARES = 4
"""Forks that one server may turn into processes; any more it starts as it always would."""
_READ = ("SGLANG_", DEVICE_ENV)
_ON_OUR_PLATFORM = {"SGLANG_PLATFORM": NAME, "GOMP_SPINCOUNT": SPIN_COUNT}
_PARENTS = 3
"""Each holds 700 MB; the tests of a module mostly want one."""
_FD_ABOVE = 600
_MOST = 1 << 20


class WarmServers:
    """Starts server processes, and in the end stops what they are forked from."""

    def __init__(self) -> None:
        self._parents: dict[frozenset[tuple[str, str]], _Parent] = {}

    def fork(self, argv: Sequence[str], env: Mapping[str, str], log_path: Path) -> Forked:
        """What `subprocess.Popen` of it would be, in a session of its own."""
        theirs = _ON_OUR_PLATFORM | dict(env)
        imported_with = frozenset(item for item in theirs.items() if item[0].startswith(_READ))
        parent = self._parents.pop(imported_with, None) or _Parent(theirs)
        self._parents[imported_with] = parent  # the last is the one that was used last
        if len(self._parents) > _PARENTS:
            self._parents.pop(next(iter(self._parents))).stop()
        return parent.fork(argv, env, log_path)

    def stop(self) -> None:
        for parent in self._parents.values():
            parent.stop()
        self._parents.clear()


class WarmServerProcess(ServerProcess):
    """A server process that is forked."""

    def __init__(self, warm: WarmServers, argv: Sequence[str], **how: Any) -> None:
        super().__init__(argv, **how)
        self._warm = warm

    def _popen(self) -> Forked:
        return self._warm.fork(self.argv, self.env, self.log_path)


class Forked:
    """As much of `subprocess.Popen` as a `ManagedProcess` uses."""

    def __init__(self, parent: _Parent, pid: int) -> None:
        self._parent = parent
        self.pid = pid

    def poll(self) -> int | None:
        return self._parent.exit_code(self.pid, 0)

    def wait(self, timeout: float | None = None) -> int:
        code = self._parent.exit_code(self.pid, timeout)
        if code is None:
            raise subprocess.TimeoutExpired([str(self.pid)], timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class _Parent:
    """Of the forks, as this process sees it."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        folder = str(Path(__file__).resolve().parent.parent)
        paths = [folder, *filter(None, [env.get("PYTHONPATH")])]
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "support.warm", str(theirs.fileno())],
                env={**env, "PYTHONPATH": os.pathsep.join(paths)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._exit_codes: dict[int, int] = {}

    def fork(self, argv: Sequence[str], env: Mapping[str, str], log_path: Path) -> Forked:
        request = {"argv": list(argv[1:]), "env": dict(env), "log": str(log_path)}
        self._socket.sendall(json.dumps(request).encode())
        while "forked" not in (message := self._receive()):
            self._take(message)
        return Forked(self, message["forked"])

    def exit_code(self, pid: int, timeout: float | None) -> int | None:
        """None while it runs."""
        while pid not in self._exit_codes:
            if not select.select([self._socket], [], [], timeout)[0]:
                return None
            self._take(self._receive())
        return self._exit_codes[pid]

    def stop(self) -> None:
        """Its forks have ended."""
        self._socket.close()
        self._process.wait(10)

    def _receive(self) -> dict[str, int]:
        message = self._socket.recv(_MOST)
        assert message, "what servers are forked from has died"
        return json.loads(message)

    def _take(self, message: dict[str, int]) -> None:
        self._exit_codes[message["pid"]] = message["code"]


# ------------------------------------------------------------------------------- in the processes


def _main() -> None:
    for name in IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no collection in a fork copies their pages
    request = _fork_on_request(socket.socket(fileno=int(sys.argv[1])))
    _spawn_from(_spares(SPARES))
    os.execv = lambda _, argv: _run(argv[1:])
    _run(request["argv"])


def _fork_on_request(requests: socket.socket) -> dict[str, Any]:
    """Returns in the forks alone, with what was asked for."""
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes.fileno())
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            woken.recv(4096)
            _report_exits(requests)
        if requests in ready:
            message = requests.recv(_MOST)
            if not message:
                sys.exit()
            request = json.loads(message)
            if pid := os.fork():
                requests.sendall(json.dumps({"forked": pid}).encode())
                continue
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for ours in (requests, woken, wakes):
                ours.close()
            _begin(request)
            return request


def _report_exits(requests: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            message = {"pid": found[0], "code": os.waitstatus_to_exitcode(found[1])}
            requests.sendall(json.dumps(message).encode())


def _begin(request: dict[str, Any]) -> None:
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.close(log)
    os.environ.clear()
    os.environ.update(request["env"])


def _run(argv: list[str]) -> None:
    """As `python *argv` would."""
    how, what, *arguments = argv
    sys.argv = [how, *arguments]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        assert how == "-c", argv
        exec(what, main.__dict__)


def _spares(number: int) -> list[tuple[int, socket.socket]]:
    """Forks, by their pid, that wait to be told what to be; in them it does not return."""
    spares: list[tuple[int, socket.socket]] = []
    for _ in range(number):
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            for _, other in spares:
                other.close()
            ours.close()
            _become(theirs)
        theirs.close()
        spares.append((pid, ours))
    return spares


def _spawn_from(spares: list[tuple[int, socket.socket]]) -> None:
    """Let what `multiprocessing` spawns be made of these."""
    spawn = multiprocessing.util.spawnv_passfds

    def spawn_warm(path: bytes, args: Sequence[str], passfds: Sequence[int]) -> int:
        if args[-1] != "--multiprocessing-fork" or not spares:
            return spawn(path, args, passfds)
        pid, spare = spares.pop()
        fds = sorted(set(passfds))
        order = {"code": args[-2], "env": dict(os.environ), "fds": fds, "cwd": os.getcwd()}
        with spare:
            socket.send_fds(spare, [b"."], fds)
            spare.sendall(json.dumps(order).encode())
        return pid

    multiprocessing.util.spawnv_passfds = spawn_warm


def _become(orders: socket.socket) -> None:
    """What this process is told to be, with the descriptors where they were; or nothing."""
    begun, fds, _, _ = socket.recv_fds(orders, 1, 64)
    if not begun:
        os._exit(0)
    with orders, orders.makefile("rb") as file:
        order = json.loads(file.read())
    _place(fds, order["fds"])
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    _run(["-c", order["code"], "--multiprocessing-fork"])
    sys.exit()


def _place(fds: list[int], numbers: list[int]) -> None:
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, _FD_ABOVE) for fd in fds]
    for fd in fds:
        os.close(fd)
    for fd, number in zip(high, numbers, strict=True):
        os.dup2(fd, number)
        os.close(fd)


if __name__ == "__main__":
    _main()
