"""One simulated system under one load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

import msgspec

from conserve_sgl.bench.load.arrivals import Arrival
from conserve_sgl.bench.load.backlog import RandomPrompts
from conserve_sgl.bench.load.prompts import OFFLINE_DRAW
from conserve_sgl.bench.load.record import RequestRecord
from conserve_sgl.bench.report.metrics import OnlineSummary, Slo, summarize
from conserve_sgl.bench.report.offline import OfflineSummary, summarize_backlog
from conserve_sgl.config import ConserveConfig
from conserve_sgl.device.table import Device, StepTimes
from conserve_sgl.policy import Policy, StepWork
from conserve_sgl.policy.latency import LatencyModel, StepSample
from conserve_sgl.profile.plan import ProfileLimits, plan_profile
from conserve_sgl.simulate.conserve import ConserveScheduler
from conserve_sgl.simulate.engine import Engine, Host, Step
from conserve_sgl.simulate.load import backlog_requests, online_requests
from conserve_sgl.simulate.stock import Limits, StockOptions, StockScheduler

__all__ = ["Load", "Outcome", "measure_profile", "run_system"]

_LONGEST_CONTEXT = 32_768

MakePolicy = Callable[[ConserveConfig, LatencyModel], Policy]


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What every system gets.

    Args:
        arrivals: the online stream.
        duration_s: the window, in which offline work is counted.
        drain_s: what the last online requests have to end in after the last arrival.
        backlog: the offline requests; None: none.
        in_flight: offline requests at a time.
        lead_s: how long before the stream the backlog begins.
        seed: of the backlog, and of the device's noise.
    """

    arrivals: Sequence[Arrival]
    duration_s: float
    drain_s: float = 30.0
    backlog: RandomPrompts | None = None
    in_flight: int = 192
    lead_s: float = 8.0
    seed: int = 0


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a system did with a load."""

    online: tuple[RequestRecord, ...]
    offline: tuple[RequestRecord, ...]
    window_s: float
    duration_s: float
    idle_share: float
    steps: int
    scheduler: StockScheduler

    def online_summary(self, slo: Slo) -> OnlineSummary:
        return summarize(self.online, self.duration_s, slo)

    def offline_summary(self) -> OfflineSummary:
        return summarize_backlog(self.offline, self.window_s)


def run_system(
    device: Device,
    load: Load,
    limits: Limits = Limits(),  # noqa: B008
    *,
    conserve: ConserveConfig | None = None,
    stock: StockOptions = StockOptions(),  # noqa: B008
    online: bool = True,
    offline: bool = True,
    hicache: bool = True,
    host: Host = Host(),  # noqa: B008
    make_policy: MakePolicy | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
    on_time: Callable[[float], None] = lambda _: None,
) -> Outcome:
    """Run one system to the end of the window, and until its online requests are done or given up.

    Args:
        device: whose steps take their time.
        load: what it gets; `online` and `offline` leave one of the two out.
        limits: of the server.
        conserve: the configuration of conserve; None: stock SGLang with the flags `stock`.
        hicache: whether conserve keeps checkpoints on the host.
        host: what happens beside the device.
        make_policy: a policy instead of conserve's own; it has a `pace`, as `SlackBudget` does.
        on_step, on_time: see `Engine`.
    """
    times = StepTimes(device, load.seed)
    scheduler = StockScheduler(limits, stock)
    if conserve is not None:
        latency = LatencyModel(measure_profile(times, limits), layers=device.layers)
        scheduler = ConserveScheduler(
            limits,
            conserve,
            latency,
            layers=device.layers,
            policy=make_policy and make_policy(conserve, latency),
            copy_s=device.copy_s(1) if hicache else None,
            options=stock,
        )
    requests = online_requests(load.arrivals) if online else []
    backlog = iter(())
    if offline and load.backlog is not None:
        backlog = backlog_requests(load.backlog, [load.seed, OFFLINE_DRAW])
    engine = Engine(
        scheduler,
        times,
        online=requests,
        backlog=backlog,
        in_flight=load.in_flight if offline else 0,
        begins_s=-load.lead_s if offline else 0.0,
        host=host,
        on_step=on_step,
        on_time=on_time,
    )
    engine.run(load.duration_s)
    last_s = max((request.due_s for request in requests), default=0.0)
    engine.run(
        max(last_s, load.duration_s) + load.drain_s if requests else -inf,
        stop=lambda: all(request.finished for request in requests),
    )
    return Outcome(
        online=tuple(request.record(host.egress_s) for request in requests),
        offline=tuple(request.record(host.egress_s) for request in engine.offline),
        window_s=load.duration_s,
        duration_s=max(engine.now_s, load.duration_s),
        idle_share=_idle_share(engine.busy, load.duration_s),
        steps=engine.steps,
        scheduler=scheduler,
    )


def measure_profile(times: StepTimes, limits: Limits) -> list[StepSample]:
    """The steps that `conserve profile` would measure on the device."""
    plan = plan_profile(
        ProfileLimits(
            chunk_tokens=limits.chunk_tokens,
            context_tokens=min(_LONGEST_CONTEXT, limits.kv_tokens),
            pool_tokens=limits.kv_tokens,
            rows=limits.rows,
        )
    )
    works = (_grown(shape.work, step) for shape in plan for step in range(shape.steps))
    return [StepSample(work, times.measure_s(work)) for work in works]


def _grown(work: StepWork, steps: int) -> StepWork:
    grown = work.decode_context + steps * work.decode_rows
    return msgspec.structs.replace(work, decode_context=grown)


def _idle_share(busy: Sequence[tuple[float, float]], window_s: float) -> float:
    spent = sum(max(min(end, window_s) - max(began, 0.0), 0.0) for began, end in busy)
    return max(1.0 - spent / window_s, 0.0)
