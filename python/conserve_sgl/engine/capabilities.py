"""What a server has beside the offline class, its queue and the budget, which every model has.

Decided once, at the start, from what SGLang says of the model and of the flags: the scheduler asks
here and nowhere else, logs the table and shows it in `/server_info`; `conserve doctor` prints the
same before a server starts. Imports neither torch nor SGLang.
"""

from __future__ import annotations

from typing import Any

import msgspec

from conserve_sgl.config import ConserveConfig
from conserve_sgl.status.record import Capability

__all__ = ["WRONG_SPLITS", "Capabilities", "Host", "decide"]

WRONG_SPLITS = {
    "Gemma2ForCausalLM": "scales embeddings in float16",
    "Gemma3ForCausalLM": "forgets the residual stream between two layers",
    "NanbeigeForCausalLM": "ends the engine",
    "TeleFLMForCausalLM": "does not scale embeddings",
}
"""Classes of SGLang 0.5.23 whose `forward_split_prefill` computes something else than `forward`."""


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What of SGLang decides.

    model: the name of its class.
    why_whole: its prefills cannot run layer by layer, as a clause; None where they can.
    drafts: speculative decoding.
    has_states: state-space layers; `why_no_states` their states may not enter the radix tree as an
        offline request grows, as a clause, or None.
    has_windows: a KV pool of their own for layers with a sliding window, which it lets go of early
        (`SGLANG_OPT_RELEASE_PREFILL_SWA`) if `drops_windows`.
    shares_prefixes: the radix cache, from which thoughts are stripped at a request's end or not.
    has_host_cache: HiCache, which writes by `write_policy`, through a buffer alone or not.
    """

    model: str
    why_whole: str | None
    drafts: bool
    returns_routed_experts: bool
    has_states: bool
    why_no_states: str | None
    has_windows: bool
    drops_windows: bool
    shares_prefixes: bool
    strips_thinking: bool
    has_host_cache: bool
    write_policy: str
    buffers_only: bool

    @classmethod
    def of_flags(
        cls, model: type, args: Any, *, has_states: bool, has_windows: bool, drops_windows: bool
    ) -> Host:
        """What is known before a server starts.

        Args:
            model: the class that SGLang serves the model by.
            args: SGLang's ServerArgs.
            has_states: SGLang's `uses_ssm_state` of the model.
            has_windows: SGLang's `is_hybrid_swa` of the model.
            drops_windows: `SGLANG_OPT_RELEASE_PREFILL_SWA` is set.
        """
        return cls(
            model=model.__name__,
            why_whole=_why_whole(model),
            drafts=args.speculative_algorithm is not None,
            returns_routed_experts=args.enable_return_routed_experts,
            has_states=has_states,
            why_no_states=_why_no_states(args) if has_states else None,
            has_windows=has_windows,
            drops_windows=drops_windows,
            shares_prefixes=not args.disable_radix_cache,
            strips_thinking=args.strip_thinking_cache,
            has_host_cache=args.enable_hierarchical_cache,
            write_policy=args.hicache_write_policy,
            buffers_only=args.hicache_host_memory_mode == "buffer_only",
        )

    @classmethod
    def of_scheduler(cls, scheduler: Any, *, drops_windows: bool) -> Host:
        """What is so in a scheduler whose model and caches are there; SGLang may have turned off
        what the flags ask for."""
        tree = scheduler.tree_cache
        of_flags = cls.of_flags(
            type(scheduler.tp_worker.model_runner.model),
            scheduler.server_args,
            has_states=scheduler.is_hybrid_ssm,
            has_windows=scheduler.is_hybrid_swa,
            drops_windows=drops_windows,
        )
        return msgspec.structs.replace(
            of_flags,
            shares_prefixes=tree.supports_prefix_sharing(),
            has_host_cache=tree.cache_controller is not None,
        )


class Capabilities(msgspec.Struct, frozen=True):
    """All of them, for one server."""

    sitting_out: Capability
    slices: Capability
    checkpoints: Capability
    host_copies: Capability

    @property
    def all(self) -> tuple[Capability, ...]:
        """In the order in which they are shown."""
        return (self.sitting_out, self.slices, self.checkpoints, self.host_copies)

    @property
    def table(self) -> str:
        """For a log: a line for each."""
        rows = [f"  {capability.name:<12} {capability}" for capability in self.all]
        return "\n".join(["capabilities of this model with these flags:", *rows])


def decide(host: Host, config: ConserveConfig) -> Capabilities:
    """What `host` and the operator allow."""
    checkpoints = _checkpoints(host, config)
    return Capabilities(
        sitting_out=Capability(
            "sitting out",
            True,
            "offline rows leave a step and come back as they were, whatever the model",
            f"the row and the KV that they keep{_what_else_they_keep(host)}",
        ),
        slices=_slices(host, config),
        checkpoints=checkpoints,
        host_copies=_host_copies(host, checkpoints),
    )


def _what_else_they_keep(host: Host) -> str:
    kept = {", windows too": host.has_windows, ", and the slots of their states": host.has_states}
    return "".join(name for name, is_so in kept.items() if is_so)


def _why_no_states(args: Any) -> str | None:
    """Where SGLang keeps states in ways that checkpoints were not run with."""
    if args.mamba_radix_cache_strategy == "extra_buffer_lazy":
        # The slot of the last state that was kept is given back and taken anew as steps run.
        return "--mamba-radix-cache-strategy=extra_buffer_lazy moves states between slots"
    flags = ("enable_linear_replayssm", "enable_int8_mamba_checkpoint", "enable_unified_memory")
    for name in flags:
        if getattr(args, name):
            return f"--{name.replace('_', '-')} was not run with checkpoints of states"
    return None


def _why_whole(model: type) -> str | None:
    if not hasattr(model, "forward_split_prefill"):
        return f"{model.__name__} has no forward_split_prefill"
    for base in model.__mro__:
        if (wrong := WRONG_SPLITS.get(base.__name__)) is not None:
            return f"forward_split_prefill of {base.__name__} {wrong}"
    return None


def _slices(host: Host, config: ConserveConfig) -> Capability:
    without = (
        "an online arrival waits for a whole offline prefill step, which slo.yield_ms and "
        "--chunked-prefill-size bound"
    )
    if not config.slices.enabled:
        why = "slices.enabled is false"
    elif host.why_whole is not None:
        why = host.why_whole
    elif host.drafts:
        why = "with --speculative-algorithm a worker that drafts runs the steps"
    elif host.has_states:
        # What SGLang does to the states before a step is done when the step begins, not a layer.
        why = f"{host.model} has state-space layers, whose prefills were never run in slices"
    elif host.returns_routed_experts:
        # One buffer holds the experts of all layers of the step that runs, and is read at its end.
        why = "--enable-return-routed-experts would return those of the steps in between"
    else:
        why = f"an offline prefill of {host.model} can yield between two layers"
        return Capability("slices", True, why, "the CUDA graphs of what runs in slices")
    return Capability("slices", False, why, without)


def _checkpoints(host: Host, config: ConserveConfig) -> Capability:
    if not config.checkpoint.enabled:
        why = "checkpoint.enabled is false"
    elif not host.shares_prefixes:
        why = "the radix cache is off"
    elif host.strips_thinking:
        # SGLang frees what was thought between think tags from the row when a request ends; a tree
        # that had it already would be asked to free it twice.
        why = "--strip-thinking-cache takes from a request what its checkpoint would hold"
    elif host.has_windows and host.drops_windows:
        # It takes what the tree holds of a request for its prompt's alone.
        why = "SGLANG_OPT_RELEASE_PREFILL_SWA lets go of windows that a checkpoint would hold"
    elif host.why_no_states is not None:
        why = host.why_no_states
    else:
        why = "the radix cache keeps what an offline request has computed as it grows"
        if host.has_states:
            why += ", as far as there is a state"
        return Capability("checkpoints", True, why, "the room that nobody else asks for")
    costs = "a request that gives way is computed again, but for what the cache has of its prompt"
    return Capability("checkpoints", False, why, costs)


def _host_copies(host: Host, checkpoints: Capability) -> Capability:
    without = "a request that gives way keeps its KV only while the device has room"
    if not checkpoints.on:
        why, without = "there are no checkpoints to copy", "what gives way is computed again"
    elif host.has_states:
        why = "states were never loaded ahead from the host"
    elif not host.has_host_cache:
        why = "--enable-hierarchical-cache would add host memory, and is not given"
    elif host.write_policy != "write_through":
        why = (
            f"--hicache-write-policy={host.write_policy} copies too late: with write_through "
            "giving way is a release"
        )
    elif host.buffers_only:
        why = "--hicache-host-memory-mode=buffer_only keeps nothing on the host"
    else:
        why = "HiCache copies them to host memory where that pays"
        costs = "up to half of the host pool, and a moment of the step after each copy"
        return Capability("host copies", True, why, costs)
    return Capability("host copies", False, why, without)
