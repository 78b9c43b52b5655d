"""The refused flags against SGLang's own ServerArgs and command line."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

import pytest

from conserve_sgl import compat
from conserve_sgl.doctor import Level, host_cache


def server_args(*flags: str) -> Any:
    """ServerArgs as `_launch_subprocesses` gets them: parsed, not resolved."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return ServerArgs.from_cli_args(parser.parse_args(["--model-path", "dummy", *flags]))


def test_stock_defaults_do_not_conflict():
    assert compat.conflicts(server_args()) == []


@pytest.mark.parametrize("refusal", compat._REFUSED, ids=lambda refusal: refusal.field)
def test_a_refused_field_is_one_of_server_args(refusal):
    assert not refusal.refuses(getattr(server_args(), refusal.field))


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--speculative-algorithm", "EAGLE"], id="drafts from a model"),
        pytest.param(["--disaggregation-mode", "prefill"], id="a prefill engine"),
        pytest.param(["--attn-dp-size", "2"], id="DP attention"),
        pytest.param(["--dp-size", "2"], id="several replicas"),
        pytest.param(["--pp-size", "2"], id="pipeline parallelism"),
        pytest.param(["--enable-lora-overlap-loading"], id="adapters loaded beside a step"),
        pytest.param(["--enable-pdmux"], id="PD multiplexing"),
        pytest.param(["--chunked-prefill-size", "-1"], id="no chunked prefill"),
        pytest.param(["--smg-grpc-mode"], id="the gateway's gRPC"),
        pytest.param(["--grpc-port", "30001"], id="SGLang's own gRPC"),
        pytest.param(["--abort-on-priority-when-disabled"], id="priorities aborted"),
    ],
)
def test_the_flag_as_a_person_types_it_is_refused(flags):
    (sentence,) = compat.conflicts(server_args(*flags))
    assert sentence.startswith(f"{flags[0]}=")


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(["--enable-mixed-chunk"], id="mixed batches"),
        pytest.param(["--speculative-algorithm", "NGRAM"], id="drafts from n-grams"),
        pytest.param(["--enable-priority-scheduling"], id="priority scheduling"),
        pytest.param(["--enable-hierarchical-cache"], id="HiCache"),
        pytest.param(["--disable-overlap-schedule"], id="no overlap"),
        pytest.param(["--disable-radix-cache"], id="no radix cache"),
        pytest.param(["--tp-size", "2"], id="tensor parallelism"),
        pytest.param(["--tokenizer-worker-num", "2"], id="tokenizer workers"),
        pytest.param(["--enable-lora", "--lora-paths", "a=b"], id="LoRA"),
    ],
)
def test_these_flags_are_not_refused(flags):
    assert compat.conflicts(server_args(*flags)) == []


@pytest.mark.parametrize("given", ["1", "true", "yes", "y"])
def test_what_switches_the_rust_server_on(monkeypatch, given):
    # The words of this list are the ones that check_environment has to know.
    from sglang.srt.environ import envs

    monkeypatch.setenv("SGLANG_RUST_SERVER", given)
    assert envs.SGLANG_RUST_SERVER.get() is True


def test_tokenizer_workers_serve_what_the_environment_names(monkeypatch):
    from sglang.srt.entrypoints import http_server
    from sglang.srt.environ import envs

    monkeypatch.setenv(compat.WORKER_APP_ENV, "conserve_sgl.worker:app")
    assert envs.SGLANG_HTTP_SERVER_APP_PATH.get() == "conserve_sgl.worker:app"
    assert inspect.getsource(http_server).count("envs.SGLANG_HTTP_SERVER_APP_PATH.get()") == 2


def test_the_doctor_reads_fields_that_are_there():
    args = server_args("--enable-hierarchical-cache")
    finding = host_cache(args, free_gib=1e6, device_gib=80)
    assert finding.level is Level.OK
    assert args.hicache_ratio is None
