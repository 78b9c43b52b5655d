from __future__ import annotations

import random

import msgspec
import pytest

from conserve_sgl.device.measured import launch_times, with_steps
from conserve_sgl.device.table import StepTimes
from conserve_sgl.policy import StepWork
from conserve_sgl.policy.latency import StepKind, StepSample
from support.devices import grid, truth_s

HOST_S = 0.012


def measured(work: StepWork) -> float:
    """With a host that needs 12 ms to launch a step with a prompt."""
    return max(truth_s(work), HOST_S if work.prefill_tokens else 0.0)


def test_the_hosts_part_is_told_from_the_devices(device):
    samples = [StepSample(work, measured(work)) for work in grid()]
    launch_s = launch_times(samples, 0.002)
    assert launch_s[StepKind.PREFILL] == pytest.approx(HOST_S)
    assert launch_s[StepKind.DECODE] == 0.002
    times = StepTimes(with_steps(msgspec.structs.replace(device, launch_s=launch_s), samples))
    for tokens in (64, 256, 1024, 4096):
        work = StepWork.of([(tokens, 1024)])
        assert times.mean_s(work) == pytest.approx(truth_s(work), rel=0.12)
        assert times.measure_s(work) == pytest.approx(measured(work), rel=0.12)


def test_steps_of_a_shape_are_one_and_a_pause_is_left_out(device):
    work = StepWork.of([(512, 0)])
    samples = [StepSample(w, truth_s(w)) for w in grid()]
    samples += [StepSample(work, truth_s(work))] * 2 + [StepSample(work, 3.0)]
    made = with_steps(device, samples)
    assert sum(step.work == work for step in made.steps) == 1
    assert StepTimes(made).mean_s(work) == pytest.approx(truth_s(work), rel=0.02)

    slow = [StepSample(w, 5 * truth_s(w) if w == work else truth_s(w)) for w in grid()]
    assert work not in {step.work for step in with_steps(device, slow).steps}


def test_the_noise_is_the_scatter_around_the_table(device):
    rng = random.Random(3)
    samples = [StepSample(w, truth_s(w) * rng.uniform(0.95, 1.05)) for w in grid() * 30]
    noise = with_steps(device, samples).noise
    for quantiles in noise:
        assert list(quantiles) == sorted(quantiles)
        assert 0.93 < quantiles[0] < 0.98 < 1.02 < quantiles[-1] < 1.07


def test_a_kind_that_was_not_measured_keeps_its_costs(device):
    decodes = [StepSample(w, 2 * truth_s(w)) for w in grid() if w.kind is StepKind.DECODE]
    made = with_steps(device, decodes)
    assert made.costs.token_s == device.costs.token_s
    assert made.costs.mixed_row_s == device.costs.mixed_row_s
    assert made.costs.context_s == pytest.approx(2 * device.costs.context_s, rel=0.02)
