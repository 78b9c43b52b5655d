"""What the doctor finds with SGLang's own parser of flags and reader of models."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from conserve_sgl import doctor
from conserve_sgl.doctor import Finding, Level


def findings(*flags: str) -> dict[str, Finding]:
    return {finding.what: finding for finding in doctor._flags(flags)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model-path", "m", "--bogus-flag"], "unrecognized arguments: --bogus-flag"),
        (["--bogus-flag"], "the following arguments are required: --model-path"),
        (["--model-path", "m", "--port", "many"], "argument --port: invalid int value: 'many'"),
        (["--model-path", "m", "--dtype", "x"], "argument --dtype: invalid choice: 'x'"),
        (["--help"], "it prints something and ends"),
        (["--model-path", "m", "--config", "/no/such.yaml"], "/no/such.yaml"),
    ],
)
def test_flags_that_sglang_does_not_take(flags, said, capfd):
    finding = findings(*flags)["flags"]
    assert finding.level is Level.BAD
    assert said in finding.detail
    assert finding.detail.count("\n") < 3
    assert capfd.readouterr() == ("", "")


def test_a_model_that_is_there(model):
    found = findings("--model-path", str(model))
    assert found["flags"].level is found["model"].level is Level.OK
    assert found["model"].detail == f"{model}: LlamaForCausalLM"


def test_batches_want_one_tokenizer_worker(model, tmp_path):
    config = tmp_path / "conserve.yaml"
    config.write_text(f"batch: {{storage_dir: {tmp_path}/batches}}\n")
    flags = ["--model-path", str(model), "--tokenizer-worker-num"]
    bad = [f for f in doctor._flags([*flags, "2"], config) if f.level is Level.BAD]
    assert [f.what for f in bad] == ["flags"]
    assert bad[0].detail.startswith("batch.storage_dir needs --tokenizer-worker-num=1")
    for finding in (*doctor._flags([*flags, "1"], config), *doctor._flags([*flags, "2"])):
        assert finding.level is not Level.BAD


def test_a_model_that_can_be_split_is_sliced(model):
    assert findings("--model-path", str(model))["slices"].level is Level.OK


@pytest.mark.parametrize(
    ("arch", "flags", "said"),
    [
        ("MixtralForCausalLM", [], "off: MixtralForCausalLM has no forward_split_prefill"),
        ("LlamaForCausalLM", ["--enable-return-routed-experts"], "off: --enable-return-routed"),
    ],
)
def test_a_server_without_slices_is_said_to_be_one(model, monkeypatch, arch, flags, said):
    from sglang.srt.models.mixtral import MixtralForCausalLM
    from sglang.srt.models.registry import ModelRegistry

    # The models that no test serves are left out of the registry, see tests/conftest.py.
    monkeypatch.setitem(ModelRegistry.models, "MixtralForCausalLM", MixtralForCausalLM)
    config = {"model_type": arch.removesuffix("ForCausalLM").lower(), "architectures": [arch]}
    (model / "config.json").write_text(json.dumps(config))
    finding = findings("--model-path", str(model), *flags)["slices"]
    assert finding.level is Level.NOTE
    assert finding.detail.startswith(said)


@pytest.fixture
def state_space_model(model, monkeypatch) -> Path:
    from sglang.srt.models.qwen3_next import Qwen3NextForCausalLM
    from sglang.srt.models.registry import ModelRegistry

    monkeypatch.setitem(ModelRegistry.models, "Qwen3NextForCausalLM", Qwen3NextForCausalLM)
    config = {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config))
    return model


STATES_AFTER_STEPS = ["--mamba-radix-cache-strategy=no_buffer", "--disable-overlap-schedule"]


def test_a_model_with_state_space_layers(state_space_model):
    found = findings("--model-path", str(state_space_model), *STATES_AFTER_STEPS)
    assert found["model"].level is found["checkpoints"].level is Level.OK
    assert "as far as there is a state" in found["checkpoints"].detail
    assert "the slots of their states" in found["sitting out"].detail
    assert found["slices"].level is found["host copies"].level is Level.NOTE


def test_drafts_beside_state_space_layers_are_refused(state_space_model):
    flags = [*STATES_AFTER_STEPS, "--speculative-algorithm=NGRAM"]
    found = findings("--model-path", str(state_space_model), *flags)
    assert found["model"].level is Level.BAD
    assert "beside state-space layers are not supported" in found["model"].detail


@pytest.mark.parametrize(
    "name", ["/nonexistent", "nonexistent", "no/such/model", "", "./none", "a" * 200]
)
def test_a_model_that_cannot_be(name):
    found = findings("--model-path", name)
    assert found["model"].level is Level.BAD
    assert found["model"].detail.startswith(f"{name}: ")


def test_a_model_without_weights(model):
    (model / "model.safetensors").unlink()
    assert findings("--model-path", str(model))["model"].detail == f"{model}: has no weights"
    dummy = findings("--model-path", str(model), "--load-format", "dummy")
    assert dummy["model"].level is Level.OK


def test_a_tokenizer_that_is_not_there(model):
    found = findings("--model-path", str(model), "--tokenizer-path", "/nonexistent")
    assert found["tokenizer"].level is Level.BAD


def test_a_folder_without_a_model(tmp_path):
    assert findings("--model-path", str(tmp_path))["model"].level is Level.BAD


def test_a_model_with_a_configuration_that_is_none(model):
    (model / "config.json").write_text("{")
    assert findings("--model-path", str(model))["model"].level is Level.BAD


def test_a_model_of_the_hub_that_is_not_on_this_machine_is_not_checked_nor_fetched(monkeypatch):
    def no_network(*_args, **_kwargs):
        raise AssertionError("asks the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    finding = findings("--model-path", "no-such-owner/no-such-model")["model"]
    assert finding.level is Level.NOTE
    assert "is not on this machine: not checked" in finding.detail


def test_what_a_server_would_have_is_told_before(model):
    found = findings("--model-path", str(model), "--disable-radix-cache")
    names = ("sitting out", "slices", "checkpoints", "host copies")
    on = {name: found[name].level is Level.OK for name in names}
    assert on == {"sitting out": True, "slices": True, "checkpoints": False, "host copies": False}
    assert found["checkpoints"].detail.startswith("off: the radix cache is off")


def test_a_configuration_turns_capabilities_off(model, tmp_path):
    config = tmp_path / "conserve.yaml"
    config.write_text("slices: {enabled: false}")
    found = {f.what: f for f in doctor._flags(["--model-path", str(model)], config)}
    assert found["slices"].detail.startswith("off: slices.enabled is false")


def test_without_the_model_the_flags_are_told_of_still():
    found = findings("--model-path", "no-such-owner/no-such-model")
    assert found["host copies"].detail.startswith("off: --enable-hierarchical-cache")
    assert "slices" not in found


@pytest.mark.parametrize(
    ("layer_types", "level"),
    [
        (["sliding_attention", "full_attention"], Level.OK),
        (["sliding_attention", "sliding_attention"], Level.BAD),
    ],
)
def test_windows_in_all_layers_are_refused(model, monkeypatch, layer_types, level):
    from sglang.srt.models.mellum import MellumForCausalLM
    from sglang.srt.models.registry import ModelRegistry

    # The models that no test serves are left out of the registry, see tests/conftest.py.
    monkeypatch.setitem(ModelRegistry.models, "MellumForCausalLM", MellumForCausalLM)
    config = {
        "model_type": "mellum",
        "architectures": ["MellumForCausalLM"],
        "num_hidden_layers": 2,
        "layer_types": layer_types,
    }
    (model / "config.json").write_text(json.dumps(config))
    finding = findings("--model-path", str(model))["model"]
    assert finding.level is level
    refused = "sliding windows in all layers are not supported by conserve" in finding.detail
    assert refused == (level is Level.BAD)


def test_a_port_that_is_taken_is_noted(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        finding = findings("--model-path", str(model), "--port", port)["port"]
    assert finding.level is Level.NOTE
    assert finding.detail == f"127.0.0.1:{port} cannot be had now: Address already in use"
