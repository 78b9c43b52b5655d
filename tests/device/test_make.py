"""A server's steps become a device."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from conserve_sgl.cli import app
from conserve_sgl.device.make import kv_bytes_per_token, make_device
from conserve_sgl.device.table import StepTimes, load_device
from conserve_sgl.errors import InputError
from conserve_sgl.policy import StepWork
from conserve_sgl.policy.latency import StepSample
from conserve_sgl.profile import Profile
from support.devices import grid, truth_s


def log_of(tmp_path: Path, *lines: StepSample | str) -> Path:
    path = tmp_path / "steps.jsonl"
    texts = [x if isinstance(x, str) else msgspec.json.encode(x).decode() for x in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


SERVED = [StepSample(work, truth_s(work)) for work in grid()]


def test_the_command_writes_a_device_that_a_simulation_takes(tmp_path, profile):
    out = tmp_path / "mine.json"
    log = log_of(tmp_path, *SERVED)
    arguments = ["device", str(log), "--profile", str(profile), "--out", str(out)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "mine.json: 72 shapes of" in done.output
    device = load_device(out)
    assert (device.name, device.gpu, device.backend) == ("mine", "NVIDIA H100", "fa3")
    assert device.layers == 32
    assert device.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert device.copy_bytes_per_s == 25e9
    assert device.decode_graph_rows[-1] == 256
    work = StepWork.of([(2048, 1024)])
    assert StepTimes(device).mean_s(work) == pytest.approx(truth_s(work), rel=0.03)


def made(log: Path, profile: Path, **options):
    return make_device([log], profile, name="mine", **{"copy_bytes_per_s": 1e10, **options})


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('[{"prefill_tokens":0,"decode_rows":1,"prompts":0},-0.1]', "a step takes a time above 0"),
        ('[{"prefill_tokens":9,"prompts":0},0.1]', "prompt tokens and prompts go together"),
        ("[{}, 0.1]", "a step of nothing"),
        ('{"rows": 1}', "not a step"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(tmp_path, profile, bad, reason):
    log = log_of(tmp_path, SERVED[0], bad, SERVED[1])
    with pytest.raises(InputError, match=rf"steps\.jsonl:2: .*{reason}"):
        made(log, profile)


def test_steps_of_another_engine_are_refused(tmp_path, profile):
    slow = [StepSample(s.work, 4 * s.seconds) for s in SERVED]
    with pytest.raises(
        InputError, match=r"steps take 4(\.\d)? times what the profile of .*model on"
    ):
        made(log_of(tmp_path, *slow), profile)


def test_without_the_models_configuration_the_kv_has_to_be_given(tmp_path, profile):
    (tmp_path / "model" / "config.json").unlink()
    log = log_of(tmp_path, *SERVED)
    with pytest.raises(InputError, match="give --kv-bytes"):
        made(log, profile)
    assert made(log, profile, kv_bytes=1000.0).kv_bytes_per_token == 1000


def test_a_cpu_has_no_graphs_and_launches_nothing(tmp_path, profile):
    found = msgspec.json.decode(profile.read_bytes(), type=Profile)
    identity = msgspec.structs.replace(found.identity, device="AMD EPYC, 2 threads")
    profile.write_bytes(msgspec.json.encode(msgspec.structs.replace(found, identity=identity)))
    device = made(log_of(tmp_path, *SERVED), profile)
    assert device.launch_s == (0, 0, 0)
    assert device.decode_graph_rows == ()


def test_the_kv_of_a_model_without_grouped_heads(tmp_path, profile):
    config = {"num_attention_heads": 4, "hidden_size": 256}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    found = msgspec.json.decode(profile.read_bytes(), type=Profile)
    assert kv_bytes_per_token(profile, found.identity, 2) == 2 * 2 * 4 * 64 * 2
