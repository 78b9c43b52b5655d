"""The slack budget against random traffic, on an engine whose step times are not its model.

The engine's rows are dear up to six and cheaper after that, attention costs, and every step varies;
the budget is given a straight line with a margin. Each run is held against an oracle: the same
arrivals and step times with all offline work dropped.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conserve_sgl.policy import (
    Coefficients,
    LatencyModel,
    OnlineReserve,
    SlackBudget,
    StepPlan,
    StepView,
    StepWork,
)
from conserve_sgl.policy.slo import Factor, Pace, Seconds, Slo
from support.simulated import Engine, Job, LinearTimes

SLO = Slo(Seconds(1.5), Seconds(0.2))
YIELD_S = 0.2
TIMES = LinearTimes(step=0.035, token=0.0012, row=0.0032, margin=1.25)


def true_times(seed: int) -> Callable[[StepWork], float]:
    rng = random.Random(seed)

    def seconds(work: StepWork) -> float:
        rows = 0.006 * min(work.decode_rows, 6) + 0.0022 * max(work.decode_rows - 6, 0)
        prompt = 0.0011 * work.prefill_tokens + 6e-8 * work.prefill_attention
        return (0.028 + prompt + rows + 1.2e-6 * work.decode_context) * rng.lognormvariate(0, 0.08)

    return seconds


def online_jobs(seed: int, *, n: int, rate_per_s: float) -> list[Job]:
    rng = random.Random(seed)
    jobs, now_s = [], 0.0
    for _ in range(n):
        now_s += rng.expovariate(rate_per_s)
        jobs.append(Job(now_s, rng.randint(20, 400), rng.randint(1, 50)))
    return jobs


def offline_jobs(seed: int, n: int) -> list[Job]:
    rng = random.Random(seed)
    return [Job(0.0, rng.randint(20, 600), rng.randint(1, 60), offline=True) for _ in range(n)]


def engine(seed: int, *, slo: Slo = SLO, **options) -> Engine:
    budget = SlackBudget(
        TIMES, slo=slo, yield_s=YIELD_S, reserve=OnlineReserve(at_most=0.25), smallest_chunk=16
    )
    return Engine(budget, slo, true_times(seed), **options)


TRAFFIC = {
    "seed": st.integers(0, 2**32),
    "rate_per_s": st.floats(0.1, 1.0),
    "can_mix": st.booleans(),
}


def in_time(job: Job) -> bool:
    return job.ttft_s <= 1.5 and job.tpot_s <= 0.2


@pytest.mark.parametrize("can_mix", [True, False])
@pytest.mark.parametrize(("rate_per_s", "points"), [(0.3, 1), (0.6, 1), (1.0, 2.5)])
def test_online_requests_are_in_time_beside_offline_work_as_they_are_alone(
    rate_per_s, points, can_mix
):
    """At most one in a hundred more is late, two and a half where prompts take a third of the time:
    an answer that lives longer beside offline work meets more prompts of others, which nothing
    holds up."""
    late_alone = late_beside = sent = 0
    for seed in range(12):
        alone, beside = (online_jobs(seed, n=40, rate_per_s=rate_per_s) for _ in range(2))
        engine(seed, can_mix=can_mix).run(alone, [])
        crowded = engine(seed, can_mix=can_mix)
        crowded.run(beside, offline_jobs(seed, 1500), until_s=beside[-1].arrived_s + 60)
        assert all(job.done for job in beside)
        assert sum(step.offline_tokens + step.offline_rows for step in crowded.steps) > 0
        late_alone += sum(not in_time(job) for job in alone)
        late_beside += sum(not in_time(job) for job in beside)
        sent += len(alone)
    assert late_beside <= late_alone + points / 100 * sent


@settings(max_examples=25, deadline=None)
@given(**TRAFFIC)
def test_an_arrival_waits_for_steps_that_its_objective_allows(seed, rate_per_s, can_mix):
    """Half of what TTFT leaves, for the step that runs and the one that is planned."""
    alone, beside = (online_jobs(seed, n=40, rate_per_s=rate_per_s) for _ in range(2))
    engine(seed, can_mix=can_mix).run(alone, [])
    engine(seed, can_mix=can_mix).run(
        beside, offline_jobs(seed, 3000), until_s=beside[-1].arrived_s + 60
    )
    for free, crowd in zip(alone, beside, strict=True):
        if free.ttft_s <= 1.0:  # later ones queue behind others, and waits add up
            assert crowd.ttft_s <= free.ttft_s + 7 * YIELD_S


class Stock:
    """What SGLang does without a policy: prompts first and whole, then all rows."""

    pace = Pace()

    def online_ended(self, *, ttft_s: float, tpot_s: float | None) -> None:
        pass

    def plan(self, view: StepView) -> StepPlan:  # noqa: ARG002
        return StepPlan(
            offline_prefill_tokens=0,
            offline_admissions=0,
            offline_decode_rows=0,
            kv_reserve_tokens=0,
        )


objectives = st.one_of(
    st.floats(0.001, 5).map(Seconds), st.floats(1, 10, exclude_max=True).map(Factor)
)


@settings(max_examples=50, deadline=None)
@given(**TRAFFIC, ttft=objectives, tpot=objectives)
def test_without_offline_work_every_token_comes_when_it_does_without_us(
    seed, rate_per_s, can_mix, ttft, tpot
):
    """Whatever the objectives: those that cannot be met ruin nothing."""
    ours, theirs = (online_jobs(seed, n=20, rate_per_s=rate_per_s) for _ in range(2))
    engine(seed, slo=Slo(ttft, tpot), can_mix=can_mix).run(ours, [])
    Engine(Stock(), SLO, true_times(seed), can_mix=can_mix).run(theirs, [])
    assert [job.token_times_s for job in ours] == [job.token_times_s for job in theirs]


@settings(max_examples=25, deadline=None)
@given(**TRAFFIC, kv_tokens=st.integers(3_000, 30_000))
def test_every_request_ends_with_all_its_tokens(seed, rate_per_s, can_mix, kv_tokens):
    online, offline = online_jobs(seed, n=15, rate_per_s=rate_per_s), offline_jobs(seed, 60)
    wanted = sum(job.prompt_tokens + job.output_tokens for job in [*online, *offline])
    run = engine(seed, can_mix=can_mix, kv_tokens=kv_tokens)
    run.run(online, offline)
    jobs = [*online, *offline]
    assert all(job.done for job in jobs)
    assert sum(job.prompt_tokens + job.output_tokens for job in jobs) == wanted
    assert run.free_kv() == kv_tokens


@settings(max_examples=25, deadline=None)
@given(**TRAFFIC)
def test_a_step_with_offline_work_keeps_its_bound_by_the_model(seed, rate_per_s, can_mix):
    """Or, for rows that stay in the batch and for a chunk that waited for long, ends before an
    online token is late."""
    online = online_jobs(seed, n=20, rate_per_s=rate_per_s)
    run = engine(seed, can_mix=can_mix)
    run.run(online, offline_jobs(seed, 500), until_s=online[-1].arrived_s)
    for step in run.steps:
        if step.offline_tokens > 16 or step.offline_rows > 1:
            view, plan = step.view, step.plan
            late_s = view.online_late_s - max(view.now_s, view.free_at_s)
            assert TIMES.upper_s(step.work) <= max(plan.bound_s, late_s) + 1e-9


@settings(max_examples=20, deadline=None)
@given(**TRAFFIC)
def test_slack_is_used(seed, rate_per_s, can_mix):
    """Beside idle time offline work gets at least 70% of what it would get from it alone."""
    online = online_jobs(seed, n=40, rate_per_s=rate_per_s)
    end_s = online[-1].arrived_s
    alone = engine(seed, can_mix=can_mix)
    alone.run(online_jobs(seed, n=40, rate_per_s=rate_per_s), [], until_s=end_s)
    idle = 1 - sum(step.took_s for step in alone.steps) / end_s
    ceiling, beside = engine(seed), engine(seed, can_mix=can_mix)
    ceiling.run([], offline_jobs(seed, 4000), until_s=end_s)
    beside.run(online, offline_jobs(seed, 4000), until_s=end_s)
    assert _offline_rate(beside) >= 0.7 * idle * _offline_rate(ceiling)


def _offline_rate(run: Engine) -> float:
    return sum(step.offline_tokens + step.offline_rows for step in run.steps) / run.now_s


# Every objective that the configuration takes, or `conserve tune`.
COSTS = Coefficients(step=0.03, token=0.0011, attention=6e-8, row=0.003, context=1.2e-6)
SECONDS = st.floats(5e-324, 1e308)
OBJECTIVES = SECONDS.map(Seconds) | st.floats(1.0, 1e308).map(Factor)


@settings(max_examples=50, deadline=None)
@given(ttft=OBJECTIVES, tpot=OBJECTIVES, yield_s=SECONDS, can_mix=st.booleans())
def test_no_objective_stops_the_engine(ttft, tpot, yield_s, can_mix):
    slo, model = Slo(ttft, tpot), LatencyModel.of_coefficients(COSTS)
    reserve = OnlineReserve(at_most=0.25)
    budget = SlackBudget(model, slo=slo, yield_s=yield_s, reserve=reserve, smallest_chunk=16)
    online, offline = online_jobs(3, n=3, rate_per_s=1.0), offline_jobs(3, 3)
    Engine(budget, slo, true_times(3), can_mix=can_mix).run(online, offline)
    assert all(job.done for job in [*online, *offline])
