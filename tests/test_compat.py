"""The gate: which SGLang, and which of its flags, go with conserve."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest

from conserve_sgl import compat
from conserve_sgl.errors import IncompatibleError

# ServerArgs' own defaults of the fields that are looked at; tests/contract checks them.
STOCK = {
    "speculative_algorithm": None,
    "disaggregation_mode": "null",
    "enable_dp_attention": False,
    "attn_dp_size": 1,
    "dp_size": 1,
    "pp_size": 1,
    "enable_lora_overlap_loading": None,
    "enable_pdmux": False,
    "dllm_algorithm": None,
    "chunked_prefill_size": None,
    "prefill_decode_interval": None,
    "smg_grpc_mode": False,
    "grpc_port": None,
    "abort_on_priority_when_disabled": False,
}

REFUSED = [
    pytest.param("speculative_algorithm", "EAGLE", id="drafts from a model"),
    pytest.param("disaggregation_mode", "prefill", id="a prefill engine"),
    pytest.param("disaggregation_mode", "decode", id="a decode engine"),
    pytest.param("enable_dp_attention", True, id="DP attention"),
    pytest.param("attn_dp_size", 2, id="DP attention by its size"),
    pytest.param("dp_size", 2, id="several replicas in one server"),
    pytest.param("pp_size", 2, id="pipeline parallelism"),
    pytest.param("enable_lora_overlap_loading", True, id="adapters loaded beside a step"),
    pytest.param("enable_pdmux", True, id="PD multiplexing"),
    pytest.param("dllm_algorithm", "LowConfidence", id="diffusion models"),
    pytest.param("chunked_prefill_size", -1, id="no chunked prefill"),
    pytest.param("chunked_prefill_size", 0, id="chunks of nothing"),
    pytest.param("prefill_decode_interval", 8, id="decode steps between prefills"),
    pytest.param("smg_grpc_mode", True, id="the gateway's gRPC"),
    pytest.param("grpc_port", 30001, id="SGLang's own gRPC"),
    pytest.param("abort_on_priority_when_disabled", True, id="priorities aborted"),
]

ACCEPTED = [
    pytest.param({}, id="stock"),
    pytest.param({"enable_lora_overlap_loading": False}, id="adapters loaded before a step"),
    pytest.param({"attn_dp_size": None}, id="no DP attention"),
    pytest.param({"chunked_prefill_size": 8192}, id="a chunk size"),
    pytest.param({"speculative_algorithm": "NGRAM"}, id="drafts from n-grams"),
    pytest.param({"speculative_algorithm": "ngram"}, id="drafts from n-grams, as it may be typed"),
    pytest.param({"prefill_decode_interval": 0}, id="no steps between prefills"),
]


def server_args(**changed: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**STOCK, **changed})


@pytest.mark.parametrize("changed", ACCEPTED)
def test_these_flags_are_accepted(changed):
    assert compat.conflicts(server_args(**changed)) == []
    compat.check_flags(server_args(**changed))


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_this_flag_is_refused_by_name_value_and_reason(field, value):
    (sentence,) = compat.conflicts(server_args(**{field: value}))
    flag = "--" + field.replace("_", "-")
    assert sentence.startswith(f"{flag}={value!r} does not go with conserve: ")
    assert len(sentence.split(": ", 1)[1].split()) > 3


def test_every_refusal_is_listed_at_once():
    args = server_args(pp_size=2, dp_size=4)
    assert len(compat.conflicts(args)) == 2
    with pytest.raises(IncompatibleError, match=r"--dp-size=4 .*; --pp-size=2 "):
        compat.check_flags(args)


def test_every_field_that_is_looked_at_is_tested_here():
    assert {refusal.field for refusal in compat._REFUSED} == set(STOCK)
    assert {param.values[0] for param in REFUSED} == set(STOCK)


@pytest.mark.parametrize("workers", [1, 2])
def test_several_workers_go_with_our_application_and_without_batches(workers):
    compat.check_workers(workers, {}, has_batches=False)
    compat.check_workers(1, {compat.WORKER_APP_ENV: "their:app"}, has_batches=True)


@pytest.mark.parametrize(
    ("environment", "has_batches", "way_out"),
    [
        pytest.param({compat.WORKER_APP_ENV: "their:app"}, False, "unset it", id="another's app"),
        pytest.param({}, True, "conserve run-batch", id="batches"),
    ],
)
def test_what_does_not_go_with_several_workers(environment, has_batches, way_out):
    with pytest.raises(IncompatibleError, match="--tokenizer-worker-num=1") as caught:
        compat.check_workers(2, environment, has_batches=has_batches)
    assert way_out in str(caught.value)


@pytest.mark.parametrize(
    ("found", "allow", "accepted"),
    [
        pytest.param("0.5.23", None, True, id="the tested version"),
        pytest.param("0.5.24", None, False, id="a newer one"),
        pytest.param("0.5.22", None, False, id="an older one"),
        pytest.param("0.5.23.post1", None, False, id="a post-release"),
        pytest.param("0.5.23rc1", None, False, id="a candidate"),
        pytest.param("0.5.24", "1", True, id="another, allowed"),
        pytest.param("0.5.24", "0", False, id="another, allowed with 0"),
        pytest.param("0.5.24", "", False, id="another, allowed with nothing"),
        pytest.param("0.5.24", "true", False, id="another, allowed with a word"),
        pytest.param(None, None, False, id="none installed"),
        pytest.param(None, "1", False, id="none installed cannot be allowed"),
    ],
)
def test_the_version_gate(monkeypatch, found, allow, accepted):
    monkeypatch.delenv(compat.ALLOW_UNTESTED_ENV, raising=False)
    if allow is not None:
        monkeypatch.setenv(compat.ALLOW_UNTESTED_ENV, allow)
    if accepted:
        compat.check_version(found)
        return
    with pytest.raises(IncompatibleError, match=r"0\.5\.23") as caught:
        compat.check_version(found)
    # Whoever is refused is told the way out.
    way_out = compat.ALLOW_UNTESTED_ENV if found else "pip install sglang==0.5.23"
    assert way_out in str(caught.value)


def test_the_installed_version_is_read_from_its_metadata(monkeypatch):
    monkeypatch.setattr(compat, "version", lambda name: {"sglang": "1.2.3"}[name])
    assert compat.sglang_version() == "1.2.3"


def test_no_sglang_is_no_version(monkeypatch):
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(compat, "version", absent)
    assert compat.sglang_version() is None


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({}, id="nothing set"),
        pytest.param({"SGLANG_RUST_SERVER": "0"}, id="0"),
        pytest.param({"SGLANG_RUST_SERVER": "false"}, id="false"),
        pytest.param({"SGLANG_RUST_SERVER": ""}, id="empty"),
    ],
)
def test_the_python_server_is_accepted(environment):
    compat.check_environment(environment)


@pytest.mark.parametrize(
    "value",
    [
        "1",
        "true",
        "True",
        "yes",
        "YES",
        "y",
    ],
)
def test_the_rust_server_is_refused(value):
    with pytest.raises(IncompatibleError, match="SGLANG_RUST_SERVER"):
        compat.check_environment({"SGLANG_RUST_SERVER": value})
