"""Steps as SGLang and conserve form them, on a fake clock."""

from __future__ import annotations

import itertools
import random

import pytest

from conserve_sgl.bench.load.arrivals import Arrival, Gamma, Lengths
from conserve_sgl.bench.load.backlog import RandomPrompts
from conserve_sgl.bench.report.metrics import Slo
from conserve_sgl.config import ConserveConfig, SlicesConfig, SloConfig
from conserve_sgl.device.table import StepTimes
from conserve_sgl.policy import StepPlan, StepWork
from conserve_sgl.policy.slo import Pace
from conserve_sgl.simulate.engine import Engine, Host, Step
from conserve_sgl.simulate.load import backlog_requests, online_requests
from conserve_sgl.simulate.request import Request
from conserve_sgl.simulate.run import Load, Outcome, run_system
from conserve_sgl.simulate.stock import Limits, StockOptions, StockScheduler

NOW = Host(step_s=0.0, announce_s=0.0, ingress_s=0.0, egress_s=0.0, think_s=0.0)
"""A host that takes no time."""

SHORT = Lengths(median_tokens=300, sigma=0.8, min_tokens=20, max_tokens=2000)
BACKLOG = RandomPrompts(
    prompt=SHORT,
    output=Lengths(median_tokens=40, sigma=0.6, min_tokens=1, max_tokens=200),
    prefix_tokens=512,
    prefix_groups=3,
)
CONSERVE = ConserveConfig(slo=SloConfig(ttft="500ms", tpot="30ms"))
SYSTEMS = {
    "stock": {},
    "priority": {"stock": StockOptions(priority=True)},
    "mixed": {"stock": StockOptions(mixed_chunk=True)},
    "interval": {"stock": StockOptions(prefill_decode_interval=3)},
    "conserve": {"conserve": CONSERVE},
    "conserve without slices": {
        "conserve": ConserveConfig(slo=CONSERVE.slo, slices=SlicesConfig(enabled=False))
    },
    "conserve without checkpoints": {"conserve": CONSERVE, "hicache": False},
}


class Ticks:
    """A device on which every step takes a second, and a prompt token a hundredth more."""

    def draw_s(self, work: StepWork, repeated_context: int = 0) -> float:  # noqa: ARG002
        return 1.0 + 0.01 * work.prefill_tokens

    def held_s(self, work: StepWork, seconds: float) -> float:  # noqa: ARG002
        return 0.0


def online(at_s: float, prompt: int = 10, output: int = 3) -> Request:
    return online_requests([Arrival(at_s, prompt, output)])[0]


def run(requests: list[Request], *, host: Host = NOW, options=StockOptions(), **limits):  # noqa: B008
    steps: list[Step] = []
    scheduler = StockScheduler(Limits(**limits), options)
    Engine(scheduler, Ticks(), online=requests, host=host, on_step=steps.append).run()
    assert scheduler.pool.free_tokens == scheduler.pool.total_tokens
    return steps


def shapes(steps: list[Step]) -> list[tuple[int, int]]:
    return [(s.batch.work.prefill_tokens, s.batch.work.decode_rows) for s in steps]


class TestTheLoop:
    def test_without_overlap_a_step_knows_what_the_last_one_brought(self):
        one = online(0.0)
        steps = run([one], host=Host(**{**_fields(NOW), "overlap": False}))
        assert shapes(steps) == [(10, 0), (0, 1), (0, 1)]
        assert one.token_times_s == pytest.approx([1.1, 2.1, 3.1])

    def test_with_overlap_a_row_runs_once_more_before_its_end_is_seen(self):
        one = online(0.0)
        assert shapes(run([one])) == [(10, 0), (0, 1), (0, 1), (0, 1)]
        assert one.token_times_s == pytest.approx([1.1, 2.1, 3.1])

    def test_an_arrival_waits_for_the_step_that_runs_and_the_one_behind_it(self):
        first, late = online(0.0, output=9), online(1.5)
        run([first, late])
        # 1.1 to 2.1 runs, 2.1 to 3.1 is planned already; its own ends at 4.2.
        assert late.token_times_s[0] == pytest.approx(4.2)

    def test_prompts_go_before_decode_and_share_a_chunk(self):
        steps = run([online(0.0, 60), online(0.0, 60), online(0.0, 60)], chunk_tokens=100)
        assert shapes(steps)[:3] == [(100, 0), (80, 0), (0, 3)]

    def test_a_prompt_longer_than_a_chunk_is_computed_in_several(self):
        assert shapes(run([online(0.0, 250, 1)], chunk_tokens=100))[:3] == [
            (100, 0),
            (100, 0),
            (50, 0),
        ]

    def test_launching_holds_the_host_and_the_step(self):
        class Slow(Ticks):
            def held_s(self, work: StepWork, seconds: float) -> float:  # noqa: ARG002
                return 1.5 if work.prefill_tokens else 0.0

        one = online(0.0, 10, 2)
        scheduler = StockScheduler(Limits())
        Engine(scheduler, Slow(), online=[one], host=NOW).run()
        assert one.token_times_s == pytest.approx([1.5, 2.5])

    def test_a_cpu_runs_every_step_itself(self, make_device):
        device = make_device(synchronous=True)
        one, late = online(0.0, 2000, 50), online(0.01, 100, 2)
        scheduler = StockScheduler(Limits())
        Engine(scheduler, StepTimes(device), online=[one, late], host=NOW).run()
        # The prompt that runs is over before anything is planned: the late one comes next.
        prefill_s = StepTimes(device).mean_s(StepWork.of([(2000, 0)]))
        own_s = StepTimes(device).mean_s(StepWork.of([(100, 0)]))
        assert late.token_times_s[0] <= prefill_s + own_s + 0.01


def _fields(host: Host) -> dict:
    return {field: getattr(host, field) for field in host.__struct_fields__}


class TestStock:
    def test_mixed_chunks_let_rows_decode_along(self):
        first, late = online(0.0, output=9), online(1.5)
        steps = run([first, late], options=StockOptions(mixed_chunk=True))
        assert (10, 1) in shapes(steps)

    def test_the_interval_puts_so_many_decodes_behind_a_prefill(self):
        several = [online(0.0, 100, 12) for _ in range(4)]
        interval = StockOptions(prefill_decode_interval=3)
        steps = shapes(run(several, options=interval, chunk_tokens=100))
        prefills = [i for i, (tokens, _) in enumerate(steps) if tokens]
        assert [b - a for a, b in itertools.pairwise(prefills)] == [4, 4, 4]
        few = StockOptions(prefill_decode_interval=3, prefill_decode_interval_min_bs=9)
        again = shapes(run([online(0.0, 100, 12) for _ in range(4)], options=few, chunk_tokens=100))
        assert [tokens for tokens, _ in again[:4]] == [100] * 4

    def test_rows_are_a_limit_and_online_takes_one_with_priority(self):
        def requests() -> list[Request]:
            offline = [online(0.0, 10, 30) for _ in range(2)]
            for request in offline:
                request.online = False
            return [*offline, online(5.0, 10, 2)]

        patient, urgent = requests(), requests()
        run(patient, rows=2)
        run(urgent, options=StockOptions(priority=True), rows=2)
        assert patient[-1].token_times_s[0] > 30
        assert urgent[-1].token_times_s[0] < 10
        assert all(request.finished for request in urgent)

    def test_a_prompt_is_admitted_only_where_all_that_may_be_needed_is_free(self):
        pair = [online(0.0, 60, 30), online(0.0, 60, 30)]
        steps = run(pair, kv_tokens=150)
        assert max(rows for _, rows in shapes(steps)) == 1


# ------------------------------------------------------------------ every system at once


def outcome_of(device, name: str, seed: int = 1, **limits) -> Outcome:
    stream = Gamma(rate_per_s=3.0, prompt=SHORT, output=BACKLOG.output)
    load = Load(
        arrivals=stream.draw(8.0, seed),
        duration_s=8.0,
        backlog=BACKLOG,
        in_flight=24,
        lead_s=1.0,
        seed=seed,
    )
    some = {"kv_tokens": 30_000, "rows": 64, "chunk_tokens": 1024, **limits}
    return run_system(device, load, Limits(**some), **SYSTEMS[name])


@pytest.mark.parametrize("kv_tokens", [9_000, 30_000])
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_online_request_ends_and_the_same_seed_gives_the_same_run(device, name, kv_tokens):
    outcome = outcome_of(device, name, kv_tokens=kv_tokens)
    assert all(record.completed for record in outcome.online)
    assert all(len(r.chunk_times_s) == r.completion_tokens for r in outcome.online)
    assert sum(record.completed for record in outcome.offline) > 0
    for record in (*outcome.online, *outcome.offline):
        assert list(record.chunk_times_s) == sorted(record.chunk_times_s)
    again = outcome_of(device, name, kv_tokens=kv_tokens)
    assert again.online == outcome.online
    assert again.offline == outcome.offline
    assert 0 <= outcome.idle_share < 1


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_finite_backlog_ends_with_all_its_tokens_and_an_empty_pool(device, name):
    source = backlog_requests(BACKLOG, [3])
    some = list(itertools.islice(source, 60))
    shapes = itertools.islice(BACKLOG.shapes([3]), 60)
    outputs = [shape.output_tokens for shape in shapes]
    scheduler = _scheduler(device, name)
    chance = random.Random(0)
    stream = [online(chance.uniform(0, 6), 300, 30) for _ in range(20)]
    engine = Engine(
        scheduler,
        StepTimes(device, 1),
        online=sorted(stream, key=lambda r: r.due_s),
        backlog=iter(some),
        in_flight=16,
    )
    in_engine: list[int] = []
    engine._on_time = lambda _: in_engine.append(sum(not r.finished for r in engine.offline))
    engine.run()
    assert [len(request.token_times_s) for request in some] == outputs
    assert all(request.finished for request in stream)
    assert max(in_engine) <= 16
    assert scheduler.pool.free_tokens == scheduler.pool.total_tokens
    assert not scheduler.busy


def _scheduler(device, name: str):
    """As `run_system` makes it, in a pool in which requests give way."""
    load = Load(arrivals=(), duration_s=0.001)
    return run_system(
        device, load, Limits(kv_tokens=6_000, rows=32, chunk_tokens=512), **SYSTEMS[name]
    ).scheduler


def test_checkpoints_on_the_host_save_what_giving_way_costs(device):
    kept = outcome_of(device, "conserve", kv_tokens=9_000)
    lost = outcome_of(device, "conserve without checkpoints", kv_tokens=9_000)
    assert kept.scheduler.retracted
    assert lost.scheduler.retracted
    assert (
        kept.offline_summary().total_tokens_per_s > 0.97 * lost.offline_summary().total_tokens_per_s
    )


def test_an_arrival_suspends_a_sliced_prefill_and_no_layer_runs_twice(device):
    long = RandomPrompts(
        prompt=Lengths(median_tokens=4000, max_tokens=4000),
        output=Lengths(median_tokens=2, max_tokens=2),
    )
    layers: dict[int, int] = {}

    def on_step(step: Step) -> None:
        if step.batch.layers:
            layers[id(step.batch)] = step.batch.layers
            kept.append(step.batch)

    kept: list = []
    stream = tuple(Arrival(0.15 * i, 50, 2) for i in range(40))
    load = Load(arrivals=stream, duration_s=6.0, backlog=long, in_flight=4, lead_s=0.5)
    outcome = run_system(
        device, load, Limits(chunk_tokens=4096), conserve=CONSERVE, on_step=on_step
    )
    assert outcome.scheduler.suspensions > 3
    assert max(layers.values()) == device.layers
    assert len([n for n in layers.values() if n < device.layers]) <= 1 + len(stream)
    assert outcome.online_summary(Slo(500, 30)).ttft_ms.p99 < 60


def test_priority_scheduling_serves_online_first(device):
    stock, first = (
        outcome_of(device, name).online_summary(Slo(500, 30)) for name in ("stock", "priority")
    )
    assert first.ttft_ms.p99 <= stock.ttft_ms.p99


def test_the_policy_learns_the_device_as_it_goes(device):
    scheduler = outcome_of(device, "conserve").scheduler
    assert scheduler.latency.errors().steps > 300
    assert scheduler.latency.errors().median < 0.1


def test_a_policy_that_never_lets_work_run_is_told(device):
    class Idle:
        pace = Pace()

        def plan(self, _view):
            return StepPlan(
                offline_prefill_tokens=0,
                offline_admissions=0,
                offline_decode_rows=0,
                kv_reserve_tokens=0,
            )

    load = Load(arrivals=(), duration_s=100.0, backlog=BACKLOG, in_flight=1)
    with pytest.raises(RuntimeError, match="no step is ever formed"):
        run_system(device, load, conserve=CONSERVE, make_policy=lambda *_: Idle())


def test_prompts_that_begin_with_the_same_blocks_compute_them_once():
    first, second = online_requests(
        [Arrival(0.0, 250, 2, (1, 2), 100), Arrival(60.0, 230, 2, (1, 2, 3), 100)]
    )
    steps = run([first, second])
    assert [tokens for tokens, _ in shapes(steps) if tokens] == [250, 30]
    assert (first.record().cached_tokens, second.record().cached_tokens) == (0, 200)
