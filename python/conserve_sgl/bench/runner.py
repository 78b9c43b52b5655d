"""Runs a benchmark: each system in turn on a fresh server, under the same load.

start the server, warm it up
lead_s before the stream: the backlog begins
0 .. duration_s           the window: the online stream arrives, work and idleness are counted
.. + drain_s              the last online requests end, the backlog still beside them
stop the server, write the run
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from conserve_sgl.bench.arrivals import Arrival
from conserve_sgl.bench.client import LoadResult, RequestRecord, keep_in_flight, replay
from conserve_sgl.bench.environment import Environment, environment
from conserve_sgl.bench.probe import Reading, busy_share, idle_share, read_server
from conserve_sgl.bench.prompts import TimedRequest, timed_requests
from conserve_sgl.bench.results import Result, Run, read_run, run_folder, write_run
from conserve_sgl.bench.server import ServerProcess, free_port
from conserve_sgl.bench.stretch import (
    device_counters,
    device_record,
    host_arrivals,
    host_config,
    host_conserve,
)
from conserve_sgl.bench.systems import BenchConfig, SystemConfig
from conserve_sgl.config import CONFIG_ENV
from conserve_sgl.emulation import DEVICE_ENV
from conserve_sgl.errors import InputError, ServerError

__all__ = ["Runner"]

_WARMUP, _ONLINE, _OFFLINE = range(3)  # each draws other prompts from the seed
_QUIET_LEAD_S = 0.5
_DYING_S = 5.0

OnStep = Callable[[str], None]
Measured = tuple[LoadResult, tuple[RequestRecord, ...], Reading, Reading]
"""The online stream, the offline requests, and the server before and after the window."""


class Runner:
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
        # What is sent and waited for: on an emulated device, in its stretched time.
        self._scale = config.time_scale
        self._sent = host_config(config, self._scale)
        self._arrivals = host_arrivals(self.arrivals, self._scale)
        self.environment: Environment = environment()

    def pending(self, *, fresh: bool = False) -> list[tuple[SystemConfig, int]]:
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

    def run_all(
        self, *, fresh: bool = False, on_result: Callable[[Result], None] = lambda _: None
    ) -> None:
        """Measure what is pending; every run is written as it ends, and given to `on_result`.

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
        with Progress(*columns, console=self.console, refresh_per_second=2) as progress:
            task = progress.add_task("", total=len(pending) * self._expected_s())
            for number, (system, repeat) in enumerate(pending):
                title = f"{number + 1}/{len(pending)} {system.name}"
                self._run(system, repeat, _Steps(progress, task, title, number, self._expected_s()))
                result = read_run(run_folder(self.out, system.name, repeat))
                assert result is not None  # it has just been written
                on_result(result)

    def _expected_s(self) -> float:
        """A guess, for the progress bar."""
        return 30 + self._sent.offline.lead_s + self._sent.online.duration_s + 10

    def _run(self, system: SystemConfig, repeat: int, step: OnStep) -> None:
        folder = run_folder(self.out, system.name, repeat)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").unlink(missing_ok=True)
        server, env = self._server(system, folder)
        with server:
            ready_s = server.wait_healthy(
                self.config.server.ready_timeout_s, lambda _: step("starting the server")
            )
            step("warming up")
            load, offline, before, after = self._measured(system, server, step)
            server.check()
        step("stopping the server")
        records = tuple(device_record(r, self._scale) for r in (*load.records, *offline))
        _check_served(system, records, server)
        run = Run(
            system=system,
            repeat=repeat,
            fingerprint=self.fingerprint(system),
            model=self.model,
            seed=self.config.seed,
            slo=self.config.slo,
            started_unix_s=load.started_unix_s,
            window_s=self.config.online.duration_s,
            duration_s=max(load.duration_s / self._scale, self.config.online.duration_s),
            ready_s=ready_s,
            idle_share=idle_share(before, after),
            busy_share=busy_share(before, after),
            counters_before=device_counters(before.counters, self._scale),
            counters_after=device_counters(after.counters, self._scale),
            command=sys.argv,
            server_command=server.argv,
            server_env=env,
            environment=self.environment,
            emulated=self.config.emulated,
        )
        write_run(folder, Result(run, records))

    def _server(self, system: SystemConfig, folder: Path) -> tuple[ServerProcess, dict[str, str]]:
        conserve = ""  # a configuration that this process was given is not for a stock server
        if system.kind == "conserve":
            path = folder / "conserve.yaml"
            section = host_conserve(system.conserve or {}, self._scale)
            path.write_text(yaml.safe_dump(section, sort_keys=False), "utf-8")
            conserve = str(path.resolve())
        # Nor is a device that it was told to emulate: the file says on what a server runs.
        emulated = self.config.emulated
        device = {DEVICE_ENV: ""} if emulated is None else emulated.environment()
        env = {**self.config.server.env, **system.env, **device, CONFIG_ENV: conserve}
        port = free_port()
        argv = self.config.server_argv(system, self.model, port)
        return ServerProcess(argv, port=port, log_path=folder / "server.log", env=env), env

    # ---------------------------------------------------------------- one system

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
        await self._warm_up(system, url)
        requests = self._online(system, self._arrivals, _ONLINE) if system.load != "offline" else ()
        lead_s = self._sent.offline.lead_s if system.load != "online" else _QUIET_LEAD_S
        start_s = time.perf_counter() + lead_s
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            ticking = tasks.create_task(self._watch(server, step, start_s))
            window = tasks.create_task(self._read_around_window(url, start_s))
            offline = tasks.create_task(self._offline(system, url, start_s, stop))
            drain_s = self._sent.online.drain_s
            load = await replay(url, requests, drain_s=drain_s, start_s=start_s)
            before, after = await window
            stop.set()
            ticking.cancel()
        return load, offline.result(), before, after

    async def _warm_up(self, system: SystemConfig, url: str) -> None:
        first = self.arrivals[: self.config.server.warmup_requests]
        at_once = [Arrival(0.0, arrival.prompt_tokens, arrival.output_tokens) for arrival in first]
        requests = self._online(system, at_once, _WARMUP)
        result = await replay(url, requests, drain_s=self.config.server.ready_timeout_s)
        for record in result.records:
            if not record.completed:
                raise ServerError(f"a warm-up request of {system.name} failed: {record.error}")

    def _online(self, system: SystemConfig, arrivals: Any, draw: int) -> tuple[TimedRequest, ...]:
        seed = [self.config.seed, draw]
        return timed_requests(arrivals, self.config.online.token_ids, seed, system.online_body)

    async def _read_around_window(self, url: str, start_s: float) -> tuple[Reading, Reading]:
        await asyncio.sleep(start_s - time.perf_counter())
        before = await read_server(url)
        await asyncio.sleep(start_s + self._sent.online.duration_s - time.perf_counter())
        return before, await read_server(url)

    async def _offline(
        self, system: SystemConfig, url: str, start_s: float, stop: asyncio.Event
    ) -> tuple[RequestRecord, ...]:
        if system.load == "online":
            return ()
        load = self.config.offline
        bodies: Iterator[bytes] = load.backlog.bodies(
            [self.config.seed, _OFFLINE], system.offline_body
        )
        return await keep_in_flight(
            url, bodies, load.in_flight, stop, start_s=start_s, headers=system.offline_headers
        )

    async def _watch(self, server: ServerProcess, step: OnStep, start_s: float) -> None:
        """Show what the run is at; raises ServerError as soon as the server has ended."""
        while True:
            server.check()
            since_s = time.perf_counter() - start_s
            window_s = self._sent.online.duration_s
            step(
                "backlog begins"
                if since_s < 0
                else "measuring"
                if since_s < window_s
                else "draining"
            )
            await asyncio.sleep(1)


class _Steps:
    """Shows what a run is at; the bar moves with the time, never beyond the run's share of it."""

    def __init__(
        self, progress: Progress, task: Any, title: str, number: int, expected_s: float
    ) -> None:
        self._update = functools.partial(progress.update, task)
        self._title = title
        self._base_s = number * expected_s
        self._expected_s = expected_s
        self._start_s = time.monotonic()

    def __call__(self, what: str) -> None:
        spent_s = min(time.monotonic() - self._start_s, self._expected_s)
        self._update(completed=self._base_s + spent_s, description=f"{self._title}: {what}")


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
