"""The latency model: what it recovers, what it drops, how it follows, and how honest it is."""

from __future__ import annotations

import random
import statistics

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sgl.policy.latency import (
    Coefficients,
    ErrorQuantiles,
    LatencyModel,
    StepKind,
    StepSample,
    StepWork,
)
from conserve_sgl.policy.latency.costs import DECODE_KNEE_ROWS, PREFILL_KNEE_TOKENS
from conserve_sgl.policy.latency.model import MAX_CHUNK_TOKENS

GPU = Coefficients(step=4e-3, prefill=1e-3, token=3e-5, attention=2e-9, row=2e-5, context=5e-8)
CPU = Coefficients(
    step=0.02,
    prompt=2e-3,
    token=1e-3,
    early_token=2e-4,
    attention=2e-7,
    decode=0.01,
    batch=0.004,
    row=3e-3,
    early_row=2e-3,
    context=1e-6,
    mixed_row=1e-3,
)
MACHINES = pytest.mark.parametrize("truth", [GPU, CPU], ids=["gpu", "cpu"])


def random_work(rng: random.Random) -> StepWork:
    kind = rng.choice([*StepKind])
    prompts, contexts = [], []
    if kind is not StepKind.DECODE:
        resident = [rng.choice([0, rng.randint(1, 1024)]) for _ in range(rng.randint(1, 3))]
        prompts = [(rng.randint(1, 512), tokens) for tokens in resident]
    if kind is not StepKind.PREFILL:
        contexts = [rng.randint(1, 2048) for _ in range(rng.randint(1, 64))]
    return StepWork.of(prompts, contexts)


def steps_of(
    truth: Coefficients, n: int, *, noise: float = 0.0, slower: float = 1.0, seed: int = 0
) -> list[StepSample]:
    """Random steps of a machine; `noise` is the relative deviation of their times."""
    rng = random.Random(seed)
    machine = LatencyModel.of_coefficients(truth)
    works = [random_work(rng) for _ in range(n)]
    return [
        StepSample(w, machine.predict_s(w) * slower * max(rng.gauss(1, noise), 0.1)) for w in works
    ]


def error_of(model: LatencyModel, truth: Coefficients, slower: float = 1.0) -> float:
    """The median relative error over fresh steps of a machine without noise."""
    fresh = steps_of(truth, 200, slower=slower, seed=99)
    return statistics.median(abs(model.predict_s(s.work) / s.seconds - 1) for s in fresh)


def observe(model: LatencyModel, samples: list[StepSample]) -> None:
    for sample in samples:
        model.observe(sample.work, sample.seconds)


class TestStepWork:
    def test_a_prompt_attends_to_what_is_resident_and_to_half_of_itself(self):
        work = StepWork.of([(10, 100), (4, 0)], [7, 8])
        assert work == StepWork(14, 10 * 105 + 4 * 2, 2, 15, 2)

    def test_two_works_add_up_to_the_work_of_both(self):
        together = StepWork.of([(10, 100), (4, 0)], [7, 8])
        assert StepWork.of([(10, 100)], [8]).plus(StepWork.of([(4, 0)], [7])) == together
        assert StepWork.of([(10, 100)], [7, 8]).plus_prompt(4, 0) == together

    def test_an_empty_chunk_is_no_prompt(self):
        assert StepWork.of((), [5]).plus_prompt(0, 100) == StepWork.of((), [5])

    @pytest.mark.parametrize(
        ("work", "kind"),
        [
            (StepWork.of([(1, 0)]), StepKind.PREFILL),
            (StepWork.of((), [5]), StepKind.DECODE),
            (StepWork.of([(1, 0)], [5]), StepKind.MIXED),
        ],
    )
    def test_kind(self, work, kind):
        assert work.kind is kind


class TestFit:
    @MACHINES
    def test_costs_are_recovered_from_steps_without_noise(self, truth):
        fitted = LatencyModel(steps_of(truth, 300), layers=1).coefficients
        expected = msgspec.structs.asdict(truth)
        assert msgspec.structs.asdict(fitted) == pytest.approx(expected, rel=1e-2, abs=1e-9)

    @MACHINES
    def test_a_model_of_coefficients_has_them(self, truth):
        fitted = LatencyModel.of_coefficients(truth).coefficients
        expected = msgspec.structs.asdict(truth)
        assert msgspec.structs.asdict(fitted) == pytest.approx(expected, rel=1e-2, abs=1e-9)

    @MACHINES
    def test_noise_of_a_tenth_leaves_an_error_of_a_few_percent(self, truth):
        model = LatencyModel(steps_of(truth, 200, noise=0.1), layers=1)
        assert error_of(model, truth) < 0.03

    def test_features_that_do_not_help_are_dropped(self):
        fitted = LatencyModel(steps_of(GPU, 300), layers=1).coefficients
        assert fitted.early_token < GPU.token / 100
        assert fitted.mixed_row < GPU.row / 100

    def test_a_short_step_counts_as_much_as_a_long_one(self):
        # One cost has to serve decodes of 5 ms and prefills of 1 s that disagree.
        short = StepSample(StepWork.of((), [10]), 0.005)
        long = StepSample(StepWork.of([(1000, 0)]), 1.0)
        model = LatencyModel([short, long] * 20, layers=1)
        assert model.predict_s(short.work) == pytest.approx(short.seconds, rel=0.02)

    @pytest.mark.parametrize("samples", [[], [StepSample(StepWork.of([(1, 0)]), 0.0)]])
    def test_a_profile_without_times_is_refused(self, samples):
        with pytest.raises(ValueError, match="positive time"):
            LatencyModel(samples, layers=1)

    def test_one_sample_is_enough_to_predict_it(self):
        only = StepSample(StepWork.of([(100, 0)]), 0.1)
        model = LatencyModel([only], layers=1)
        assert model.predict_s(only.work) == pytest.approx(0.1, rel=1e-3)


class TestObserve:
    @MACHINES
    @pytest.mark.parametrize("slower", [0.5, 2.0])
    def test_the_fit_follows_a_machine_that_changed_its_speed(self, truth, slower):
        model = LatencyModel(steps_of(truth, 200, noise=0.03), layers=1)
        observe(model, steps_of(truth, 1500, noise=0.03, slower=slower, seed=1))
        assert error_of(model, truth, slower) < 0.05
        assert not model.is_biased

    def test_a_change_of_shape_is_followed_too(self):
        model = LatencyModel(steps_of(GPU, 200, noise=0.03), layers=1)
        observe(model, steps_of(CPU, 4000, noise=0.03, seed=1))
        assert error_of(model, CPU) < 0.1

    def test_an_hour_of_decoding_does_not_forget_what_a_prompt_costs(self):
        model = LatencyModel(steps_of(CPU, 200), layers=1)
        prompt = StepWork.of([(400, 0)])
        before_s = model.predict_s(prompt)
        decode = StepWork.of((), [300])
        for _ in range(10_000):
            model.observe(decode, 0.04)
        assert model.predict_s(decode) == pytest.approx(0.04, rel=0.05)
        assert model.predict_s(prompt) == pytest.approx(before_s, rel=0.1)

    def test_one_size_of_step_does_not_bend_the_others(self):
        # Decode rows, all alike, cannot tell the cost of a row from that of a step.
        model = LatencyModel(steps_of(CPU, 200), layers=1)
        machine = LatencyModel.of_coefficients(CPU)
        small, large = StepWork.of((), [300]), StepWork.of((), [300] * 64)
        for _ in range(5000):
            model.observe(small, machine.predict_s(small))
        assert model.predict_s(large) == pytest.approx(machine.predict_s(large), rel=0.05)

    def test_a_pause_of_the_machine_is_not_its_speed(self):
        model = LatencyModel(steps_of(CPU, 200), layers=1)
        machine = LatencyModel.of_coefficients(CPU)
        rng = random.Random(3)
        for _ in range(2000):
            work = random_work(rng)
            pause = 20 if rng.random() < 0.03 else 1
            model.observe(work, machine.predict_s(work) * pause)
        assert error_of(model, CPU) < 0.05

    @pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
    def test_what_is_not_a_time_is_passed_over(self, seconds):
        model = LatencyModel.of_coefficients(GPU)
        for _ in range(100):
            model.observe(StepWork.of((), [10]), seconds)
        assert error_of(model, GPU) < 1e-3

    def test_a_step_without_work_is_passed_over(self):
        model = LatencyModel.of_coefficients(GPU)
        for _ in range(100):
            model.observe(StepWork(), 100.0)
        assert error_of(model, GPU) < 1e-3


class TestErrors:
    def test_quantiles_of_known_errors(self):
        errors = [i / 100 for i in range(-50, 51)]
        assert ErrorQuantiles.of(errors) == ErrorQuantiles(101, 0.0, 0.25, 0.48, 0.40)

    def test_the_profile_tells_its_own_error_out_of_sample(self):
        model = LatencyModel(steps_of(CPU, 400, noise=0.1), layers=1)
        assert model.errors().steps == 400
        assert model.errors().median == pytest.approx(0.0674, rel=0.3)  # of a normal, 0.674 sigma

    @MACHINES
    def test_nine_of_ten_steps_stay_under_the_upper_quantile(self, truth):
        # Decodes twice as noisy as prefills: each kind keeps its own promise.
        rng = random.Random(5)
        noise = {StepKind.PREFILL: 0.05, StepKind.DECODE: 0.2, StepKind.MIXED: 0.1}
        machine = LatencyModel.of_coefficients(truth)
        model = LatencyModel(steps_of(truth, 200), layers=1)
        under = {kind: [] for kind in StepKind}
        for step in range(6000):
            work = random_work(rng)
            seconds = machine.predict_s(work) * max(rng.gauss(1, noise[work.kind]), 0.1)
            if step > 2000:
                under[work.kind].append(seconds <= model.upper_s(work))
            model.observe(work, seconds)
        for kind in StepKind:
            assert statistics.mean(under[kind]) == pytest.approx(0.9, abs=0.04), kind

    def test_a_bias_that_the_fit_cannot_follow_is_flagged(self):
        # Times that jump back and forth faster than the fit follows, and end high.
        model = LatencyModel.of_coefficients(GPU)
        assert not model.is_biased
        work = StepWork.of((), [10])
        base_s = model.predict_s(work)
        for i in range(128):
            model.observe(work, base_s * 1.5 * 1.05**i)
        assert model.is_biased
        assert model.bias > 0.1

    def test_no_bias_is_claimed_from_a_few_steps(self):
        model = LatencyModel.of_coefficients(GPU)
        for _ in range(20):
            model.observe(StepWork.of((), [10]), 1.0)
        assert not model.is_biased


counts = st.integers(0, 4096)
works = st.builds(
    StepWork.of,
    st.lists(st.tuples(st.integers(1, 2048), counts), max_size=4),
    st.lists(st.integers(1, 4096), max_size=80),
)
MODELS = {"gpu": LatencyModel.of_coefficients(GPU), "cpu": LatencyModel.of_coefficients(CPU)}
models = st.sampled_from(sorted(MODELS)).map(MODELS.__getitem__)


@given(model=models, work=works, more=works)
def test_more_work_never_takes_less_time(model, work, more):
    assert model.predict_s(work.plus(more)) >= model.predict_s(work)


@given(model=models, base=works, resident=counts, budget_ms=st.integers(0, 5000))
def test_the_largest_chunk_that_fits_is_the_largest_that_fits(model, base, resident, budget_ms):
    budget_s = budget_ms / 1000
    tokens = model.prefill_tokens_within_s(budget_s, resident, base)
    assert 0 <= tokens <= MAX_CHUNK_TOKENS
    if tokens:
        assert model.upper_s(base.plus_prompt(tokens, resident)) <= budget_s * (1 + 1e-9)
    # One token more is over the budget, but for the root's rounding.
    assert model.upper_s(base.plus_prompt(tokens + 1, resident)) > budget_s * (1 - 1e-9)


def test_prompt_tokens_that_cost_nothing_fit_without_end():
    free = LatencyModel.of_coefficients(Coefficients(step=0.001))
    assert free.prefill_tokens_within_s(1.0, 0) == MAX_CHUNK_TOKENS
    assert free.prefill_tokens_within_s(0.0001, 0) == 0


@pytest.mark.parametrize("tokens", [PREFILL_KNEE_TOKENS - 1, PREFILL_KNEE_TOKENS, 500])
def test_a_chunk_is_found_on_both_sides_of_the_knee(tokens):
    model = MODELS["cpu"]
    exact_s = model.upper_s(StepWork().plus_prompt(tokens, 300))
    assert model.prefill_tokens_within_s(exact_s * (1 + 1e-9), 300) == tokens


def test_rows_cost_less_beyond_the_knee():
    model = MODELS["cpu"]

    def row_s(rows: int) -> float:
        more, fewer = StepWork.of((), [1] * rows), StepWork.of((), [1] * (rows - 1))
        return model.predict_s(more) - model.predict_s(fewer)

    assert row_s(DECODE_KNEE_ROWS) > row_s(DECODE_KNEE_ROWS + 1)


def test_layers_share_the_time_of_a_step():
    model = LatencyModel.of_coefficients(GPU, layers=32)
    work = StepWork.of([(2048, 0)])
    assert model.layer_s(work, 32) == pytest.approx(model.predict_s(work))
    assert model.layer_s(work, 8) == pytest.approx(model.predict_s(work) / 4)


def test_a_model_is_the_same_after_a_round_trip_through_json():
    model = LatencyModel(steps_of(CPU, 50, noise=0.05), layers=30)
    again = LatencyModel.from_json(model.to_json())
    assert again.coefficients == model.coefficients
    assert again.errors() == model.errors()
    assert again.layers == 30


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"layers": 30, "samples": []}', b'{"layers": 30, "samples": [[]]}']
)
def test_what_is_not_a_model_is_refused(text):
    with pytest.raises(ValueError, match=r"."):
        LatencyModel.from_json(text)


@MACHINES
@given(budget_s=st.floats(allow_nan=False), resident=st.integers(0, 10**6))
def test_no_budget_raises(truth, budget_s, resident):
    tokens = LatencyModel.of_coefficients(truth).prefill_tokens_within_s(budget_s, resident)
    assert 0 <= tokens <= MAX_CHUNK_TOKENS
