from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from conserve_sgl.device.table import Device, StepTimes, load_device, shipped_devices
from conserve_sgl.errors import InputError
from conserve_sgl.policy import StepWork
from conserve_sgl.policy.latency import StepKind, StepSample
from support.devices import grid, truth_s


@pytest.mark.parametrize("name", shipped_devices())
def test_a_shipped_device_says_what_it_is_and_has_every_kind_of_step(name):
    device = load_device(name)
    assert device.name == name
    assert "H100" in device.gpu
    assert device.backend in name
    assert {step.work.kind for step in device.steps} == set(StepKind)
    assert all(len(quantiles) > 20 for quantiles in device.noise)


@pytest.mark.parametrize("name", shipped_devices())
def test_a_shipped_device_has_the_speed_of_its_gpu(name):
    times = StepTimes(load_device(name))
    assert times.mean_s(StepWork.of((), [500])) == pytest.approx(6.5e-3, rel=0.05)
    assert times.mean_s(StepWork.of([(4096, 0)])) == pytest.approx(0.108, rel=0.1)
    beside = times.mean_s(StepWork.of([(128, 1024)], [1024] * 96))
    assert beside > 0.05 if name.endswith("triton") else beside < 0.02


def test_measured_steps_are_found_again(device):
    times = StepTimes(device)
    for work in grid():
        assert times.mean_s(work) == pytest.approx(truth_s(work), rel=0.02)


@pytest.mark.parametrize(
    "work",
    [
        StepWork.of([(700, 0)]),
        StepWork.of([(3000, 2000)]),
        StepWork.of([(300, 1024)] * 3),
        StepWork.of((), [700] * 23),
        StepWork.of([(200, 1024)], [1024] * 40),
    ],
)
def test_others_are_interpolated(device, work):
    assert StepTimes(device).mean_s(work) == pytest.approx(truth_s(work), rel=0.1)


def test_beyond_the_table_its_costs_go_on(device):
    times = StepTimes(device)
    ratio = times.mean_s(StepWork.of((), [4096] * 512)) / device.costs.seconds(
        StepWork.of((), [4096] * 512)
    )
    edge = StepWork.of((), [4096] * 128)
    assert ratio == pytest.approx(times.mean_s(edge) / device.costs.seconds(edge), rel=0.01)


def test_where_nothing_was_measured_the_costs_stand_alone(device):
    decodes = tuple(s for s in device.steps if s.work.kind is StepKind.DECODE)
    times = StepTimes(msgspec.structs.replace(device, steps=decodes))
    work = StepWork.of([(700, 0)])
    assert times.mean_s(work) == device.costs.seconds(work)
    assert times.mean_s(StepWork()) == 0.0


def test_a_decode_step_is_padded_to_its_graph(make_device):
    times = StepTimes(make_device(decode_graph_rows=(1, 8, 64)))
    of = {rows: times.mean_s(StepWork(decode_rows=rows, decode_context=9000)) for rows in (9, 64)}
    assert of[9] == of[64]
    eager = StepWork(decode_rows=65, decode_context=9000)
    assert times.device.regime(eager) == (StepKind.DECODE, False)
    assert times.device.padded(eager) == eager


def test_noise_is_that_of_the_device_and_of_the_seed(device):
    noisy = msgspec.structs.replace(device, noise=((0.9, 1.0, 1.3), (), ()))
    work, decode = StepWork.of([(512, 0)]), StepWork.of((), [300])
    drawn = [[StepTimes(noisy, seed).draw_s(work) for _ in range(3)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    times = StepTimes(noisy, 1)
    factors = [times.draw_s(work) / times.mean_s(work) for _ in range(300)]
    assert 0.9 <= min(factors) < 0.95 < 1.2 < max(factors) <= 1.3
    assert times.draw_s(decode) == times.mean_s(decode)


def test_a_prefix_that_rows_share_is_read_cheaper(device):
    cheap = StepTimes(msgspec.structs.replace(device, repeated_read=0.5))
    work = StepWork(decode_rows=16, decode_context=32_000)
    assert cheap.draw_s(work, 16_000) == cheap.mean_s(StepWork(0, 0.0, 16, 24_000, 0))
    assert cheap.draw_s(work) == cheap.mean_s(work)


def test_the_layers_of_a_sliced_prefill_take_the_host_their_launch(make_device):
    times = StepTimes(make_device(eager_layer_s=2e-3))
    assert times.draw_layer_s(StepWork.of([(64, 0)])) == 2e-3
    long = StepWork.of([(4096, 0)])
    assert times.draw_layer_s(long) == pytest.approx(times.mean_s(long) / 8)


# ------------------------------------------------------------------------- bad files


def written(tmp_path: Path, device: Device, **changes) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**msgspec.to_builtins(device), **changes}))
    return path


def test_a_file_is_read_back(tmp_path, device):
    assert load_device(written(tmp_path, device)) == device


STEP = msgspec.to_builtins(StepSample(StepWork.of([(64, 0)]), 0.01))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": [STEP, [STEP[0], -0.5]]}, r"steps\[1\]: a step takes a time above 0, not -0.5"),
        ({"steps": [[{**STEP[0], "decode_rows": -1}, 0.1]]}, r"steps\[0\]: decode_rows is -1"),
        ({"steps": [[{}, 0.1]]}, r"steps\[0\]: a step of nothing"),
        ({"steps": [[{**STEP[0], "prompts": 0}, 0.1]]}, "prompt tokens and prompts go together"),
        ({"layers": 0}, r"\$\.layers"),
        ({"format": 9}, "of format 9"),
        ({"noise": [[]]}, "noise: needs a list each"),
        ({"decode_graph_rows": [8, 4]}, "decode_graph_rows do not rise"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_key(tmp_path, device, changes, reason):
    path = written(tmp_path, device, **changes)
    with pytest.raises(InputError, match=reason) as refused:
        load_device(path)
    assert refused.value.path == path


def test_a_device_that_is_not_there_is_told_with_those_that_are(tmp_path):
    with pytest.raises(InputError, match="there are h100-llama8b-fa3, h100-llama8b-triton"):
        load_device("a100")
    with pytest.raises(InputError, match="cannot be read"):
        load_device(tmp_path / "none.json")
