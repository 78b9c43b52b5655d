"""LayerSlices around a model runner that computes nothing: what runs, when, and on which rank."""

from __future__ import annotations

import time
import warnings
from collections import deque
from types import SimpleNamespace

import pytest

from conserve_sgl.config import ConserveConfig

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # SGLang warns about absent GPU kernels while it is imported
    from conserve_sgl.engine.host import ForwardMode
    from conserve_sgl.engine.slices import SUSPENDED, LayerSlices

LAYERS = 6


class Runner:
    """Logs (first layer, layers, whether attention was planned) of every forward."""

    device = "cpu"

    def __init__(self) -> None:
        self.model_config = SimpleNamespace(num_hidden_layers=LAYERS)
        self.log: list[tuple[int, int, bool]] = []

    def forward(self, forward_batch, *, reinit_attn_backend=False, split_forward_count=LAYERS):
        assert forward_batch.forward_mode is ForwardMode.SPLIT_PREFILL
        first = forward_batch.split_index
        self.log.append((first, split_forward_count, reinit_attn_backend))
        forward_batch.split_index = first + split_forward_count
        return f"output of {forward_batch.name}"


class Scripted:
    """Decides what it is told to."""

    def __init__(self, layers: list[int]) -> None:
        self._layers = deque(layers)

    def worth_slicing(self, layers: int, layer_s: float) -> bool:  # noqa: ARG002
        return True

    def next_layers(self, view) -> int:  # noqa: ARG002
        return self._layers.popleft()


def make_batch(**fields) -> SimpleNamespace:
    return SimpleNamespace(
        **{
            "reqs": [SimpleNamespace(beam_group=None, offline=True)],
            "forward_mode": ForwardMode.EXTEND,
            "extend_num_tokens": 100,
            "hicache_consumer_index": -1,
            "input_embeds": None,
            "replace_embeds": None,
            "return_hidden_states": False,
            "multimodal_inputs": [None],
            **fields,
        }
    )


def make_slices(runner=None, layers=(), **options) -> LayerSlices:
    options = {
        "config": ConserveConfig(),
        "enabled": True,
        "is_offline": lambda req: req.offline,
        "layer_s": lambda _batch: 0.001,
        "inbox": None,
        "agree": lambda value: value,
        **options,
    }
    slices = LayerSlices(runner or Runner(), **options)
    slices._decision = Scripted(list(layers))
    return slices


def run(slices: LayerSlices, runner: Runner, batch, name: str = "first"):
    """As the scheduler does: SGLang makes a forward batch and calls the runner."""

    def run_batch():
        fresh = SimpleNamespace(split_index=0, forward_mode=ForwardMode.EXTEND, name=name)
        return runner.forward(fresh)

    return slices.run(batch, run_batch, until_s=float("inf"))


def accepts(slices: LayerSlices, batch, *, fresh: bool = True) -> bool:
    return slices.accepts(batch, fresh=fresh)


def test_all_layers_run_once_and_the_forward_is_the_runner_s_again():
    runner = Runner()
    slices = make_slices(runner, [1, 3, 2])
    assert run(slices, runner, make_batch()) == "output of first"
    assert runner.log == [(0, 1, True), (1, 3, False), (4, 2, False)]
    assert runner.forward.__func__ is Runner.forward
    assert slices.suspended is None
    assert slices.state()["batches_sliced"] == 1


def test_a_batch_goes_on_where_it_was_suspended_with_what_it_had():
    runner = Runner()
    slices = make_slices(runner, [2, 0, 0, 1, 0, 2, 1])
    batch = make_batch()
    reqs = batch.reqs
    for _ in range(3):
        assert accepts(slices, batch)
        assert run(slices, runner, batch, name="first") is SUSPENDED
        assert batch.reqs == []  # the event loop's; it must merge nothing
        assert slices.suspended_reqs == reqs
        assert runner.forward.__func__ is Runner.forward
        batch = slices.suspended
    assert run(slices, runner, batch, name="a later one") == "output of first"
    assert runner.log == [(0, 2, True), (2, 1, True), (3, 2, True), (5, 1, False)]
    state = slices.state()
    assert (state["suspensions"], state["resumes"], state["batches_sliced"]) == (3, 3, 1)
    assert state["layers_computed"] == LAYERS
    assert batch.reqs == reqs


def test_no_other_prefill_starts_while_one_is_suspended():
    runner = Runner()
    slices = make_slices(runner, [0])
    run(slices, runner, make_batch())
    assert not accepts(slices, make_batch())
    assert accepts(slices, slices.suspended)


def test_giving_up_returns_the_requests_and_counts_what_is_lost():
    runner = Runner()
    slices = make_slices(runner, [4, 0])
    batch = make_batch()
    reqs = batch.reqs
    run(slices, runner, batch)
    assert slices.give_up() == reqs
    assert slices.suspended is None
    assert slices.give_up() == []
    assert slices.state()["layers_given_up"] == 4
    assert slices.state()["batches_given_up"] == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"forward_mode": ForwardMode.MIXED},
        {"forward_mode": ForwardMode.DECODE},
        {"reqs": [SimpleNamespace(beam_group=None, offline=False)]},
        {"reqs": [SimpleNamespace(beam_group=object(), offline=True)]},
        {"input_embeds": object()},
        {"replace_embeds": object()},
        {"multimodal_inputs": [None, object()]},
        {"return_hidden_states": True},
    ],
)
def test_what_is_not_sliced(fields):
    assert accepts(make_slices(), make_batch())
    assert not accepts(make_slices(), make_batch(**fields))


def test_slices_can_be_turned_off():
    slices = make_slices(enabled=False)
    assert not accepts(slices, make_batch())


def test_an_error_of_the_forward_leaves_the_runner_as_it_was():
    runner = Runner()
    slices = make_slices(runner, ["not a number of layers"])
    with pytest.raises(TypeError):
        run(slices, runner, make_batch())
    assert runner.forward.__func__ is Runner.forward


def test_all_ranks_do_what_rank_0_decides():
    decided: list[int] = []

    def tell(value: int) -> int:
        decided.append(value)
        return value

    def run_to_the_end(slices: LayerSlices, runner: Runner) -> list:
        batch, results = make_batch(), []
        while results[-1:] != ["output of first"]:
            assert accepts(slices, batch)
            results.append(run(slices, runner, batch))
            batch = slices.suspended
        return results

    ranks = Runner(), Runner()
    rank_0 = make_slices(ranks[0], [1, 0, 3, 0, 0, 2], agree=tell)
    results = run_to_the_end(rank_0, ranks[0])

    told = deque(decided)
    rank_1 = make_slices(ranks[1], [6] * 99, agree=lambda _value: told.popleft())
    assert run_to_the_end(rank_1, ranks[1]) == results
    assert ranks[1].log == ranks[0].log
    assert not told


def test_a_load_from_host_memory_ends_before_the_batch_is_suspended():
    runner, waited = Runner(), []
    counter = SimpleNamespace(num_layers=LAYERS, wait_until=waited.append)
    slices = make_slices(runner, [1, 0, 0], load_counter=counter)
    run(slices, runner, make_batch(hicache_consumer_index=2))
    assert waited == [LAYERS - 1]
    assert slices.suspended.hicache_consumer_index == -1
    run(slices, runner, slices.suspended)
    assert waited == [LAYERS - 1]


def test_where_no_fresh_prefill_may_only_the_suspended_one_runs_in_slices():
    runner = Runner()
    slices = make_slices(runner, [1, 0, 1])
    batch = make_batch()
    assert not accepts(slices, batch, fresh=False)
    run(slices, runner, batch)
    assert accepts(slices, slices.suspended, fresh=False)


def test_how_long_an_arrival_waited_is_kept():
    sent_s = time.monotonic() - 0.007
    inbox = SimpleNamespace(poll=lambda: None, oldest_sent_s=lambda: sent_s)
    runner = Runner()
    slices = make_slices(runner, [1, 0], inbox=inbox)
    run(slices, runner, make_batch())
    assert slices.state()["arrival_to_yield_ms"]["p50"] >= 7


def test_a_layer_is_timed_from_the_slices_that_ran():
    runner = Runner()
    slices = make_slices(runner, [1, 1, 0], layer_s=lambda _batch: 1e6)
    batch = make_batch()
    assert accepts(slices, batch)
    assert slices.layer_s == 1e6
    run(slices, runner, batch)
    assert slices.layer_s < 1e6  # two layers took no time
