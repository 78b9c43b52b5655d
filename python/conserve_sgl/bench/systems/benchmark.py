"""Runs a benchmark: each system in turn on a fresh server, under the same load.

start the server, warm it up
lead_s before the stream: the backlog begins
0 .. duration_s           the window: the online stream arrives, work and idleness are counted
.. + drain_s              the last online requests end, the backlog still beside them
stop the server, write the run

Systems that share a server are measured one after the other before it stops, their caches emptied.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import yaml
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from conserve_sgl.bench.load.arrivals import Arrival
from conserve_sgl.bench.load.prompts import (
    OFFLINE_DRAW,
    ONLINE_DRAW,
    WARMUP_DRAW,
    TimedRequest,
    timed_requests,
)
from conserve_sgl.bench.load.record import LoadResult, RequestRecord
from conserve_sgl.bench.load.streams import keep_in_flight, replay
from conserve_sgl.bench.load.stretch import (
    device_counters,
    device_record,
    host_arrivals,
    host_conserve,
)
from conserve_sgl.bench.report.environment import Environment, clocks, environment
from conserve_sgl.bench.report.results import Result, Run, read_run, run_folder, write_run
from conserve_sgl.bench.report.system import SystemConfig
from conserve_sgl.bench.systems.config import BenchConfig, offline_headers
from conserve_sgl.bench.systems.probe import Reading, busy_share, idle_share, read_server
from conserve_sgl.bench.systems.progress import PlainProgress
from conserve_sgl.bench.systems.server import ServerProcess, free_port
from conserve_sgl.bench.systems.shared import (
    SERVER_LOG,
    STEPS,
    ServerFiles,
    empty_caches,
    server_key,
    turn_dial,
)
from conserve_sgl.config import CONFIG_ENV
from conserve_sgl.emulation import DEVICE_ENV
from conserve_sgl.errors import InputError, ServerError
from conserve_sgl.profile.steps import STEP_LOG_ENV

__all__ = ["Benchmark"]

_QUIET_LEAD_S = 0.5
_DYING_S = 5.0
_START_S, _END_S = 45.0, 5.0  # guesses, for the progress bar and for what fits into a time limit

OnStep = Callable[[str], None]
Pending = tuple[SystemConfig, int]
"""A system and the number of its repeat."""


class Measured(NamedTuple):
    """The online stream, the offline requests, and the server before and after the window."""

    load: LoadResult
    offline: tuple[RequestRecord, ...]
    before: Reading
    after: Reading
    clocks: str | None


class _Served(NamedTuple):
    """A server that is ready, and what is to be noted of it."""

    server: ServerProcess
    env: dict[str, str]
    ready_s: float
    files: ServerFiles


class Benchmark:
    """Measures the systems of one configuration.

    Args:
        config: what to run; the conserve sections in it have been checked.
        model: path or name of the model.
        out: folder for results; made when missing.
        console: where progress goes.
    """

    def __init__(self, config: BenchConfig, model: str, out: Path, console: Console) -> None:
        self.config = config
        self.model = model
        self.out = out
        self.console = console
        self.arrivals = config.online.arrivals.draw(config.online.duration_s, config.seed)
        self._scale = config.time_scale  # what is sent, waited for and told is in stretched time
        self.environment: Environment = environment()

    def pending(self, *, fresh: bool = False) -> list[Pending]:
        """Runs that are not done yet, repeats outermost: a drift of the machine hits all alike.

        Raises:
            InputError: the output folder holds a run of the same name that was measured
                differently.
        """
        return [
            (system, repeat)
            for repeat in range(1, self.config.repeats + 1)
            for system in self.config.systems
            if fresh or not self._is_done(system, repeat)
        ]

    def _is_done(self, system: SystemConfig, repeat: int) -> bool:
        folder = run_folder(self.out, system.name, repeat)
        done = read_run(folder)
        if done is not None and done.run.fingerprint != self.fingerprint(system):
            raise InputError(
                folder, "was measured under another configuration; take another --out, or --fresh"
            )
        return done is not None

    def fingerprint(self, system: SystemConfig) -> str:
        """Of all in the configuration that decides how `system` fares."""
        config = self.config
        parts = (config.seed, config.slo, config.server, config.online, config.offline)
        parts += () if config.emulated is None else (config.emulated,)
        text = msgspec.json.encode((self.model, *parts, msgspec.structs.replace(system, dial=None)))
        return hashlib.sha256(text).hexdigest()[:16]

    def window_s(self, system: SystemConfig) -> float:
        """Seconds of the stream that `system` gets: all of it, or its own window."""
        return min(system.window_s or math.inf, self.config.online.duration_s)

    def run_all(
        self,
        *,
        fresh: bool = False,
        time_limit_s: float = math.inf,
        on_result: Callable[[Result], None] = lambda _: None,
    ) -> list[Pending]:
        """Measure what is pending; every run is written as it ends, and given to `on_result`.

        Nothing is begun that would not end within `time_limit_s` from now; what was left out for
        that is returned.

        Raises:
            InputError: see `pending`.
            ServerError: a server did not start, died, or served nothing.
        """
        pending = self.pending(fresh=fresh)
        done = len(self.config.systems) * self.config.repeats - len(pending)
        if done:
            self.console.print(f"{done} of the runs are there already: {self.out}/runs")
        columns = (
            TextColumn("{task.description:<44}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} s"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        groups = self._groups(pending)
        with Progress(*columns, console=self.console, refresh_per_second=2) as progress:
            expected_s = sum(_START_S + sum(self._expected_s(s) for s, _ in g) for g in groups)
            steps = _Steps(progress, progress.add_task("", total=expected_s), len(pending))
            ends_s = time.monotonic() + time_limit_s
            left_out = [self._run_group(group, steps, ends_s, on_result) for group in groups]
        return [*itertools.chain.from_iterable(left_out)]

    def _groups(self, pending: Sequence[Pending]) -> list[list[Pending]]:
        """What one server does, in order."""
        if not self.config.server.shared:
            return [[each] for each in pending]
        alike = itertools.groupby(
            pending, key=lambda each: (server_key(self._told(each[0])), each[1])
        )
        return [list(group) for _, group in alike]

    def _told(self, system: SystemConfig) -> SystemConfig:
        """`system` with the configuration that its server gets, in the time of its clock."""
        if system.kind != "conserve":
            return system
        section = host_conserve(system.conserve or {}, self._scale)
        return msgspec.structs.replace(system, conserve=section)

    def _expected_s(self, system: SystemConfig) -> float:
        """A guess at what `system` takes on a server that is ready."""
        return self._lead_s(system) + (self.window_s(system) + _END_S) * self._scale

    def _lead_s(self, system: SystemConfig) -> float:
        """Of this machine's time."""
        lead_s = self.config.offline.lead_s * self._scale
        return lead_s if system.load != "online" else _QUIET_LEAD_S

    def _start_s(self) -> float:
        """What a server takes to start: as long as the slowest of this folder, or a guess."""
        known = (read_run(path) for path in (self.out / "runs").glob("*.*"))
        return max((result.run.ready_s for result in known if result), default=_START_S)

    def _run_group(
        self,
        group: Sequence[Pending],
        steps: _Steps,
        ends_s: float,
        on_result: Callable[[Result], None],
    ) -> Sequence[Pending]:
        """Measure a group on a server of its own; what would not end before `ends_s`."""
        start_s = self._start_s()
        with ExitStack() as stack:
            served = None
            for number, (system, repeat) in enumerate(group):
                expected_s = self._expected_s(system) + (0.0 if served else start_s)
                if time.monotonic() + expected_s > ends_s:
                    return group[number:]
                folder = self._emptied_folder(system, repeat)
                if served is None:
                    step = steps.next(system.name, start_s)
                    served = stack.enter_context(self._serving(system, folder, step))
                step = steps.next(system.name, self._expected_s(system), is_new=number > 0)
                self._make_ready(served, system, step, is_first=number == 0)
                measured = self._measured(system, served.server, step)
                served.server.check()
                served.files.share(folder)
                on_result(self._write(folder, system, repeat, measured, served))
        return ()

    def _emptied_folder(self, system: SystemConfig, repeat: int) -> Path:
        """Of a run that begins; what an earlier one of its name left no longer counts."""
        folder = run_folder(self.out, system.name, repeat)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("run.json", SERVER_LOG, STEPS):
            (folder / name).unlink(missing_ok=True)
        return folder

    @contextmanager
    def _serving(self, system: SystemConfig, folder: Path, step: OnStep) -> Iterator[_Served]:
        """A server for `system` and those that share it, whose files grow in `folder`."""
        server, env = self._server(system, folder)
        files = ServerFiles(folder)
        with server:
            timeout_s = self.config.server.ready_timeout_s
            ready_s = server.wait_healthy(timeout_s, lambda _: step("starting the server"))
            yield _Served(server, env, ready_s, files)
            step("stopping the server")
        files.close()

    def _make_ready(
        self, served: _Served, system: SystemConfig, step: OnStep, *, is_first: bool
    ) -> None:
        if is_first:
            step("warming up")
            self._warm_up(system, served.server)
        else:
            step("emptying the caches")
            empty_caches(served.server.base_url)
            if system.kind == "conserve":
                turn_dial(served.server.base_url, self._told(system).conserve or {})

    def _write(
        self,
        folder: Path,
        system: SystemConfig,
        repeat: int,
        measured: Measured,
        served: _Served,
    ) -> Result:
        load, offline, before, after, at_clocks = measured
        records = tuple(device_record(r, self._scale) for r in (*load.records, *offline))
        _check_served(system, records, served.server)
        window_s = self.window_s(system)
        run = Run(
            system=system,
            repeat=repeat,
            fingerprint=self.fingerprint(system),
            model=self.model,
            seed=self.config.seed,
            slo=system.slo or self.config.slo,
            started_unix_s=load.started_unix_s,
            window_s=window_s,
            duration_s=max(load.duration_s / self._scale, window_s),
            ready_s=served.ready_s,
            idle_share=idle_share(before, after),
            busy_share=busy_share(before, after),
            counters_before=device_counters(before.counters, self._scale),
            counters_after=device_counters(after.counters, self._scale),
            clocks=at_clocks,
            command=sys.argv,
            server_command=served.server.argv,
            server_env=served.env,
            environment=self.environment,
            emulated=self.config.emulated,
        )
        result = Result(run, records)
        write_run(folder, result)
        return result

    def _server(self, system: SystemConfig, folder: Path) -> tuple[ServerProcess, dict[str, str]]:
        conserve = ""  # a configuration that this process was given is not for a stock server
        if system.kind == "conserve":
            path = folder / "conserve.yaml"
            section = self._told(system).conserve or {}
            path.write_text(yaml.safe_dump(section, sort_keys=False), "utf-8")
            conserve = str(path.resolve())
        # Nor is a device that it was told to emulate: the file says on what a server runs.
        emulated = self.config.emulated
        device = {DEVICE_ENV: ""} if emulated is None else emulated.environment()
        env = {**self.config.server.env, **system.env, **device, CONFIG_ENV: conserve}
        if self.config.server.step_log:
            env[STEP_LOG_ENV] = str((folder / STEPS).resolve())
        port = free_port()
        argv = self.config.server_argv(system, self.model, port)
        return ServerProcess(argv, port=port, log_path=folder / SERVER_LOG, env=env), env

    # ---------------------------------------------------------------- one system

    def _warm_up(self, system: SystemConfig, server: ServerProcess) -> None:
        asyncio.run(self._serve_some(system, server.base_url))

    def _measured(self, system: SystemConfig, server: ServerProcess, step: OnStep) -> Measured:
        try:
            return asyncio.run(self._measure(system, server, step))
        except ExceptionGroup as faults:  # of the tasks that stop each other when one fails
            ours, others = faults.split(ServerError)
            if ours is not None:
                raise ours.exceptions[0] from None
            assert others is not None  # what is not in one half is in the other
            first = others.exceptions[0]
            if not isinstance(first, aiohttp.ClientError | OSError):
                raise
            server.wait(_DYING_S)  # its end says more than a connection that failed
            server.check()
            reason = f"the server of {system.name} stopped answering: {first!r}"
            raise ServerError(reason) from first

    async def _measure(self, system: SystemConfig, server: ServerProcess, step: OnStep) -> Measured:
        url = server.base_url
        arrivals = [a for a in self.arrivals if a.at_s < self.window_s(system)]
        arrivals = host_arrivals(arrivals, self._scale)
        requests = self._online(system, arrivals, ONLINE_DRAW) if system.load != "offline" else ()
        start_s = time.perf_counter() + self._lead_s(system)
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            window_s = self.window_s(system) * self._scale
            ticking = tasks.create_task(self._watch(server, step, start_s, window_s))
            window = tasks.create_task(self._read_around_window(url, start_s, window_s))
            offline = tasks.create_task(self._offline(system, url, start_s, stop))
            drain_s = self.config.online.drain_s * self._scale
            load = await replay(url, requests, drain_s=drain_s, start_s=start_s)
            before, after, at_clocks = await window
            stop.set()
            ticking.cancel()
        return Measured(load, offline.result(), before, after, at_clocks)

    async def _serve_some(self, system: SystemConfig, url: str) -> None:
        first = self.arrivals[: self.config.server.warmup_requests]
        at_once = [Arrival(0.0, arrival.prompt_tokens, arrival.output_tokens) for arrival in first]
        requests = self._online(system, at_once, WARMUP_DRAW)
        result = await replay(url, requests, drain_s=self.config.server.ready_timeout_s)
        for record in result.records:
            if not record.completed:
                raise ServerError(f"a warm-up request of {system.name} failed: {record.error}")

    def _online(self, system: SystemConfig, arrivals: Any, draw: int) -> tuple[TimedRequest, ...]:
        seed = [self.config.seed, draw]
        return timed_requests(arrivals, self.config.online.token_ids, seed, system.online_body)

    async def _read_around_window(
        self, url: str, start_s: float, window_s: float
    ) -> tuple[Reading, Reading, str | None]:
        await asyncio.sleep(start_s - time.perf_counter())
        before = await read_server(url)
        await asyncio.sleep(start_s + window_s - time.perf_counter())
        after = await read_server(url)
        return before, after, await asyncio.to_thread(clocks)

    async def _offline(
        self, system: SystemConfig, url: str, start_s: float, stop: asyncio.Event
    ) -> tuple[RequestRecord, ...]:
        if system.load == "online":
            return ()
        load = self.config.offline
        bodies: Iterator[bytes] = load.backlog.bodies(
            [self.config.seed, OFFLINE_DRAW], system.offline_body
        )
        return await keep_in_flight(
            url, bodies, load.in_flight, stop, start_s=start_s, headers=offline_headers(system)
        )

    async def _watch(
        self, server: ServerProcess, step: OnStep, start_s: float, window_s: float
    ) -> None:
        """Show what the run is at; raises ServerError as soon as the server has ended."""
        while True:
            server.check()
            since_s = time.perf_counter() - start_s
            step(
                "backlog begins"
                if since_s < 0
                else "measuring"
                if since_s < window_s
                else "draining"
            )
            await asyncio.sleep(1)


class _Steps:
    """Shows what a benchmark is at; the bar moves with the time, never beyond a step's share."""

    def __init__(self, progress: Progress, task: TaskID, runs: int) -> None:
        self._update = functools.partial(progress.update, task)
        self._runs, self._run = runs, 0
        self._done_s = self._share_s = 0.0
        self._plain = PlainProgress(progress.console)

    def next(self, name: str, expected_s: float, *, is_new: bool = True) -> OnStep:
        """What shows the steps of the run of `name`, or of the next stretch of it."""
        self._run += is_new
        self._done_s += self._share_s
        self._share_s = expected_s
        title = f"{self._run}/{self._runs} {name}"
        base_s, start_s, said = self._done_s, time.monotonic(), ""

        def show(what: str) -> None:
            nonlocal said
            is_new, said = what != said, what
            (self._plain.say if is_new else self._plain.still)(f"{title}: {what}")
            spent_s = min(time.monotonic() - start_s, expected_s)
            self._update(completed=base_s + spent_s, description=f"{title}: {what}")

        return show


def _check_served(
    system: SystemConfig, records: tuple[RequestRecord, ...], server: ServerProcess
) -> None:
    """A class of which not one request got a token was not measured, it failed."""
    for class_ in ("online", "offline"):
        of_class = [record for record in records if record.class_ == class_]
        if of_class and not any(record.chunk_times_s for record in of_class):
            # Starving offline work is a result; refusing it is a mistake in the configuration.
            faults = [r.error for r in of_class if r.error and r.error.startswith("HTTP")]
            if faults:
                raise ServerError(
                    f"{system.name} served no {class_} request: {faults[0]} "
                    f"(log: {server.log_path})"
                )
