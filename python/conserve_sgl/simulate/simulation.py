"""Runs the systems of a simulation, and their ceilings; what comes out reads like a benchmark's."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from math import inf

import msgspec

from conserve_sgl.bench.load.prompts import OFFLINE_DRAW
from conserve_sgl.bench.report.environment import Environment, environment
from conserve_sgl.bench.report.metrics import OnlineSummary, Slo
from conserve_sgl.bench.report.results import Result, Run, SystemResult
from conserve_sgl.config import SloConfig
from conserve_sgl.device.table import StepTimes
from conserve_sgl.errors import InputError
from conserve_sgl.policy.latency import StepKind
from conserve_sgl.policy.slo import Factor, Seconds
from conserve_sgl.simulate.ceiling import BacklogMean, Ceiling, OnlineRequest, Room, ceiling
from conserve_sgl.simulate.config import Simulation, SystemRun
from conserve_sgl.simulate.conserve import ConserveScheduler
from conserve_sgl.simulate.load import online_requests
from conserve_sgl.simulate.run import Load, Outcome, run_system

__all__ = ["Simulated", "Simulator", "objectives_ms"]

_BACKLOG_SAMPLE = 4000


class Simulated(msgspec.Struct, frozen=True):
    """A system that was run: what it did, and what a scheduler could have done at most."""

    run: SystemRun
    result: Result
    ceiling: Ceiling

    @property
    def system(self) -> SystemResult:
        return SystemResult([self.result])


class Simulator:
    """Runs the systems of `simulation`, one after the other."""

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        online, offline = simulation.online, simulation.offline
        self.load = Load(
            arrivals=online.arrivals.draw(online.duration_s, simulation.seed),
            duration_s=online.duration_s,
            drain_s=online.drain_s,
            backlog=offline.backlog,
            in_flight=offline.in_flight,
            lead_s=offline.lead_s,
            seed=simulation.seed,
        )
        if not self.load.arrivals:
            reason = f"no online request arrives within {online.duration_s:g} s"
            raise InputError(simulation.path, reason, key="online.arrivals")
        here = environment()
        gpu = f"{simulation.device.gpu} (simulated)"
        self.environment: Environment = msgspec.structs.replace(here, gpus=(gpu,))
        self._online_only: OnlineSummary | None = None
        self._ceilings: dict[Slo | None, Ceiling] = {}

    def run(self, run: SystemRun, on_time: Callable[[float], None]) -> Simulated:
        """One system; `on_time` is told the time of the load as it goes on.

        The online-only system is to be run first: relative objectives are relative to it.
        """
        load, system = self.load, run.system
        started_unix_s = time.time()
        outcome = run_system(
            self.simulation.device,
            load,
            run.flags.limits,
            conserve=run.conserve,
            stock=run.flags.options,
            online=system.load != "offline",
            offline=system.load != "online",
            hicache=run.flags.hicache,
            host=msgspec.structs.replace(self.simulation.host, overlap=run.flags.overlap),
            on_time=on_time,
        )
        if self._online_only is None and system.is_online_baseline:
            self._online_only = outcome.online_summary(Slo(1.0, 1.0))
        slo = objectives_ms(run.slo, self._online_only)
        result = self._result(run, outcome, slo, started_unix_s)
        return Simulated(run, result, self._ceiling(system.load, slo))

    def _ceiling(self, load: str, slo: Slo) -> Ceiling:
        """Of this load under these objectives; nothing is in the way of offline work alone."""
        if load == "online":
            return Ceiling(0.0)
        key = None if load == "offline" else slo
        if key not in self._ceilings:
            self._ceilings[key] = self._bound(key)
        return self._ceilings[key]

    def _bound(self, slo: Slo | None) -> Ceiling:
        simulation, load = self.simulation, self.load
        backlog = simulation.offline.backlog
        limits = simulation.flags.limits
        room = Room(
            chunk_tokens=limits.chunk_tokens,
            rows=limits.rows,
            offline_rows=min(load.in_flight, limits.rows),
            kv_tokens=max(limits.kv_tokens - backlog.prefix_tokens * backlog.prefix_groups, 1),
            graph_rows=simulation.device.decode_graph_rows,
        )
        times = StepTimes(simulation.device)
        return ceiling(
            times.mean_s,
            () if slo is None else self._stream(),
            self._mean_request,
            room,
            window_s=load.duration_s,
            ttft_s=inf if slo is None else slo.ttft_ms / 1e3,
            tpot_s=inf if slo is None else slo.tpot_ms / 1e3,
            launch_s=times.launch_s,
        )

    @cached_property
    def _mean_request(self) -> BacklogMean:
        backlog = self.simulation.offline.backlog
        shapes = backlog.shapes([self.simulation.seed, OFFLINE_DRAW])
        some = itertools.islice(shapes, _BACKLOG_SAMPLE)
        return BacklogMean.of(
            ((backlog.prefix_tokens, s.prompt_tokens, s.output_tokens) for s in some),
            repeated_read=self.simulation.device.repeated_read,
        )

    def _stream(self) -> list[OnlineRequest]:
        """The online requests, with what of their prompts an endless cache would hold."""
        seen: set = set()
        stream = []
        for request in online_requests(self.load.arrivals):
            known = list(itertools.takewhile(seen.__contains__, request.blocks))
            seen.update(request.blocks)
            cached = min(len(known) * request.block_tokens, request.prompt_tokens - 1)
            tokens = (request.prompt_tokens, request.output_tokens, cached)
            stream.append(OnlineRequest(request.due_s, *tokens))
        return stream

    def _result(self, run: SystemRun, outcome: Outcome, slo: Slo, started_unix_s: float) -> Result:
        simulation = self.simulation
        counters = _counters(outcome)
        record = Run(
            system=run.system,
            repeat=1,
            fingerprint="simulated",
            model=f"{simulation.device.model} ({simulation.device.name})",
            seed=simulation.seed,
            slo=slo,
            started_unix_s=started_unix_s,
            window_s=outcome.window_s,
            duration_s=outcome.duration_s,
            ready_s=0.0,
            idle_share=outcome.idle_share,
            counters_before=dict.fromkeys(counters, 0),
            counters_after=counters,
            command=sys.argv,
            server_command=["simulated"],
            server_env={},
            environment=self.environment,
        )
        return Result(record, (*outcome.online, *outcome.offline))


def objectives_ms(slo: SloConfig, online_only: OnlineSummary | None) -> Slo:
    """The objectives as times; a factor is one of the online-only run's 99th percentile."""
    objectives = slo.objectives()
    assert online_only is not None, "online-only is run first"

    def of(objective: Seconds | Factor, p99_ms: float) -> float:
        match objective:
            case Seconds(seconds):
                return 1e3 * seconds
            case Factor(factor):
                return factor * p99_ms

    return Slo(
        of(objectives.ttft, online_only.ttft_ms.p99), of(objectives.tpot, online_only.tpot_ms.p99)
    )


def _counters(outcome: Outcome) -> Mapping[str, int | float]:
    scheduler = outcome.scheduler
    counters: dict[str, int | float] = {"steps": outcome.steps, "preempted": scheduler.retracted}
    if not isinstance(scheduler, ConserveScheduler):
        return counters
    counters["slices.suspensions"] = scheduler.suspensions
    for kind in StepKind:
        errors = scheduler.latency.errors(kind)
        counters[f"latency.errors.{kind.name.lower()}.median"] = errors.median
        counters[f"latency.errors.{kind.name.lower()}.p95"] = errors.p95
    return counters
