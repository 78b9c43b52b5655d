"""The steps of a profile: within the engine's limits, and enough to tell the costs apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.policy.latency import Coefficients, LatencyModel, StepKind, StepSample, StepWork
from conserve_sgl.profile.plan import ProfileLimits, plan_profile

SERVERS = {
    "tiny": ProfileLimits(chunk_tokens=128, context_tokens=4096, pool_tokens=4096, rows=16),
    "cpu": ProfileLimits(chunk_tokens=1024, context_tokens=8192, pool_tokens=131_072, rows=512),
    "h100": ProfileLimits(
        chunk_tokens=8192, context_tokens=131_072, pool_tokens=400_000, rows=2048
    ),
}
COSTS = Coefficients(
    step=5e-3,
    prefill=2e-3,
    prompt=1e-3,
    token=3e-5,
    early_token=1e-5,
    attention=2e-9,
    decode=1e-3,
    batch=2e-3,
    row=2e-5,
    early_row=5e-5,
    context=5e-8,
    mixed_row=1e-5,
)
servers = pytest.mark.parametrize("limits", SERVERS.values(), ids=SERVERS.keys())


@servers
def test_a_profile_tells_all_costs_apart(limits):
    machine = LatencyModel.of_coefficients(COSTS)
    works = [shape.work for shape in plan_profile(limits)]
    fitted = LatencyModel([StepSample(w, machine.predict_s(w)) for w in works], layers=1)
    predicted = np.array([fitted.predict_s(w) for w in works])
    assert predicted == pytest.approx([machine.predict_s(w) for w in works], rel=1e-3)
    unseen = StepWork.of([(limits.chunk_tokens // 3, 40)], [100] * (limits.rows // 3))
    assert fitted.predict_s(unseen) == pytest.approx(machine.predict_s(unseen), rel=0.01)


@servers
def test_any_beginning_has_every_kind_of_step(limits):
    kinds = {shape.work.kind for shape in plan_profile(limits)[:12]}
    assert kinds == set(StepKind)


@servers
def test_a_profile_is_short(limits):
    plan = plan_profile(limits)
    assert 40 <= len(plan) <= 120
    assert len(set(plan)) == len(plan)


@given(
    limits=st.builds(
        ProfileLimits,
        chunk_tokens=st.integers(1, 16_384),
        context_tokens=st.integers(64, 200_000),
        pool_tokens=st.integers(256, 1_000_000),
        rows=st.integers(1, 4096),
        step_tokens=st.integers(1, 16),
        mixes=st.booleans(),
    )
)
def test_every_step_fits_the_engine(limits):
    ahead = 2 * (limits.step_tokens - 1)  # what SGLang allocates for drafts, beyond the step's own
    for shape in plan_profile(limits):
        assert limits.mixes or not (shape.prompts and shape.decode_contexts)
        steps = shape.steps * limits.step_tokens + ahead
        ends = [new + resident for new, resident in shape.prompts]
        ends += [context + steps for context in shape.decode_contexts]
        assert sum(new for new, _ in shape.prompts) <= limits.chunk_tokens
        assert max(ends) <= limits.context_tokens
        assert sum(ends) <= limits.pool_tokens
        assert len(ends) <= limits.rows
        assert all(new > 0 for new, _ in shape.prompts)
        assert all(context > 0 for context in shape.decode_contexts)
