"""What is decided of a server at its start, from what SGLang says of the model and the flags."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest

from conserve_sgl.config import CheckpointConfig, ConserveConfig, SlicesConfig
from conserve_sgl.engine.capabilities import Host, decide


class InLayers:
    """A model that can be split."""

    forward_split_prefill = None


class InOnePiece:
    """A model that cannot."""


class Gemma3ForCausalLM(InLayers):
    """A model that is split wrongly, and one that takes after it."""


class Derived(Gemma3ForCausalLM):
    """As it says."""


def host(
    model: type = InLayers,
    *,
    states: bool = False,
    windows: bool = False,
    drops: bool = False,
    **flags,
) -> Host:
    args = SimpleNamespace(
        **{
            "speculative_algorithm": None,
            "enable_return_routed_experts": False,
            "disable_radix_cache": False,
            "strip_thinking_cache": False,
            "enable_hierarchical_cache": True,
            "hicache_write_policy": "write_through",
            "hicache_host_memory_mode": "cache",
            "mamba_radix_cache_strategy": "extra_buffer",
            "enable_linear_replayssm": False,
            "enable_int8_mamba_checkpoint": False,
            "enable_unified_memory": False,
            **flags,
        }
    )
    return Host.of_flags(model, args, has_states=states, has_windows=windows, drops_windows=drops)


@pytest.mark.parametrize(
    ("decided_by", "config"),
    [(host(), ConserveConfig()), (host(windows=True), ConserveConfig())],
    ids=["Llama", "windows"],
)
def test_a_model_that_has_them_all(decided_by, config):
    capabilities = decide(decided_by, config)
    assert all(capability.on for capability in capabilities.all)


@pytest.mark.parametrize(
    ("decided_by", "config", "off", "why"),
    [
        (host(InOnePiece), ConserveConfig(), ["slices"], "InOnePiece has no forward_split_prefill"),
        (
            host(Derived),
            ConserveConfig(),
            ["slices"],
            "forward_split_prefill of Gemma3ForCausalLM forgets the residual stream",
        ),
        (
            host(enable_return_routed_experts=True),
            ConserveConfig(),
            ["slices"],
            "--enable-return-routed-experts",
        ),
        (
            host(speculative_algorithm="NGRAM"),
            ConserveConfig(),
            ["slices"],
            "a worker that drafts runs the steps",
        ),
        (
            host(),
            ConserveConfig(slices=SlicesConfig(enabled=False)),
            ["slices"],
            "slices.enabled is false",
        ),
        (
            host(),
            ConserveConfig(checkpoint=CheckpointConfig(enabled=False)),
            ["checkpoints", "host copies"],
            "checkpoint.enabled is false",
        ),
        (
            host(disable_radix_cache=True),
            ConserveConfig(),
            ["checkpoints", "host copies"],
            "the radix cache is off",
        ),
        (
            host(strip_thinking_cache=True),
            ConserveConfig(),
            ["checkpoints", "host copies"],
            "--strip-thinking-cache",
        ),
        (
            host(windows=True, drops=True),
            ConserveConfig(),
            ["checkpoints", "host copies"],
            "SGLANG_OPT_RELEASE_PREFILL_SWA",
        ),
        (
            host(enable_hierarchical_cache=False),
            ConserveConfig(),
            ["host copies"],
            "--enable-hierarchical-cache would add host memory",
        ),
        (
            host(hicache_write_policy="write_back"),
            ConserveConfig(),
            ["host copies"],
            "write_back copies too late",
        ),
        (
            host(hicache_host_memory_mode="buffer_only"),
            ConserveConfig(),
            ["host copies"],
            "keeps nothing on the host",
        ),
        (
            host(states=True),
            ConserveConfig(),
            ["slices", "host copies"],
            "InLayers has state-space layers",
        ),
        (
            host(InOnePiece, states=True, enable_linear_replayssm=True),
            ConserveConfig(),
            ["slices", "checkpoints", "host copies"],
            "InOnePiece has no forward_split_prefill",
        ),
    ],
)
def test_what_is_off_and_why(decided_by, config, off, why):
    capabilities = decide(decided_by, config)
    lacking = [capability for capability in capabilities.all if not capability.on]
    assert [capability.name for capability in lacking] == off
    assert why in lacking[0].why
    assert all(capability.costs for capability in capabilities.all)


def test_windows_that_a_model_has_not_cannot_be_dropped():
    assert decide(host(drops=True), ConserveConfig()).checkpoints.on


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"mamba_radix_cache_strategy": "extra_buffer_lazy"}, "extra_buffer_lazy moves states"),
        ({"enable_linear_replayssm": True}, "--enable-linear-replayssm was not run"),
        ({"enable_int8_mamba_checkpoint": True}, "--enable-int8-mamba-checkpoint was not run"),
        ({"enable_unified_memory": True}, "--enable-unified-memory was not run"),
    ],
)
def test_states_that_no_checkpoint_may_hold(flags, said):
    assert said in decide(host(states=True, **flags), ConserveConfig()).checkpoints.why
    assert decide(host(**flags), ConserveConfig()).checkpoints.on


def test_rows_that_sit_out_keep_their_states():
    costs = decide(host(states=True), ConserveConfig()).sitting_out.costs
    assert costs == "the row and the KV that they keep, and the slots of their states"


def test_the_table_has_a_line_for_each():
    capabilities = decide(host(InOnePiece), ConserveConfig())
    _, *lines = capabilities.table.splitlines()
    assert len(lines) == len(capabilities.all)
    for line, capability in zip(lines, capabilities.all, strict=True):
        assert line.split(capability.name)[1].split()[0] == ("on:" if capability.on else "off:")
        assert capability.why in line
        assert capability.costs in line


def test_it_goes_into_the_state_of_a_server():
    (_, slices, *_) = decide(host(InOnePiece), ConserveConfig()).all
    assert msgspec.to_builtins(slices) == {
        "name": "slices",
        "on": False,
        "why": "InOnePiece has no forward_split_prefill",
        "costs": slices.costs,
    }
