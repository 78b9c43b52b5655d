"""Whether this SGLang, and the flags it was started with, go with conserve.

Import-light: needs neither torch nor sglang, so that `conserve doctor` can tell what is missing.
The SGLang names that we import are in `conserve_sgl.engine.host`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import msgspec

from conserve_sgl.errors import IncompatibleError

__all__ = [
    "ALLOW_UNTESTED_ENV",
    "TESTED_VERSIONS",
    "WORKER_APP_ENV",
    "check_environment",
    "check_flags",
    "check_version",
    "check_workers",
    "conflicts",
    "sglang_version",
]

TESTED_VERSIONS = ("0.5.23",)
ALLOW_UNTESTED_ENV = "CONSERVE_ALLOW_UNTESTED"
WORKER_APP_ENV = "SGLANG_HTTP_SERVER_APP_PATH"
"""Names the application that SGLang's tokenizer workers import."""


class _Refusal(msgspec.Struct, frozen=True):
    """A server argument, the flag a person knows it by, and the values that are refused."""

    field: str
    flag: str
    refuses: Callable[[Any], bool]
    reason: str


def _unless(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: value not in allowed


_SLICES = "its forward pass is not the one that conserve schedules"
_RANKS = "its ranks would take different scheduling decisions"
_NO_HTTP = "it bypasses the HTTP server, where the service class is read"
_REFUSED = (
    _Refusal(
        "speculative_algorithm",
        "--speculative-algorithm",
        lambda name: name is not None and name.upper() != "NGRAM",
        "only NGRAM was run with it; checkpoints do not know yet what a model that drafts leaves",
    ),
    _Refusal(
        "disaggregation_mode",
        "--disaggregation-mode",
        _unless("null"),
        "prefill and decode run on separate engines",
    ),
    _Refusal("enable_dp_attention", "--enable-dp-attention", _unless(False), _RANKS),
    _Refusal("attn_dp_size", "--attn-dp-size", _unless(None, 1), _RANKS),
    _Refusal(
        "dp_size",
        "--dp-size",
        _unless(1),
        "the arrival channel reaches one scheduler; run one server a replica behind a gateway, "
        "as docs/fleet.md has it",
    ),
    _Refusal("pp_size", "--pp-size", _unless(1), "pipeline stages run batches of their own"),
    _Refusal(
        "enable_lora_overlap_loading",
        "--enable-lora-overlap-loading",
        _unless(None, False),
        "it loads adapters for the requests that it sees, and rows that sit out would go on "
        "without theirs",
    ),
    _Refusal("enable_pdmux", "--enable-pdmux", _unless(False), _SLICES),
    _Refusal("dllm_algorithm", "--dllm-algorithm", _unless(None), _SLICES),
    _Refusal(
        "chunked_prefill_size",
        "--chunked-prefill-size",
        lambda tokens: tokens is not None and tokens <= 0,
        "without chunks an offline prompt is one long step that nothing can interrupt",
    ),
    _Refusal(
        "prefill_decode_interval",
        "--prefill-decode-interval",
        _unless(None, 0),
        "between two prefills it forms no prefill batch at all, online prompts or suspended ones; "
        "slo.tpot says what they may take from the rows that decode",
    ),
    _Refusal("smg_grpc_mode", "--smg-grpc-mode", _unless(False), _NO_HTTP),
    _Refusal("grpc_port", "--grpc-port", _unless(None), _NO_HTTP),
    _Refusal(
        "abort_on_priority_when_disabled",
        "--abort-on-priority-when-disabled",
        _unless(False),
        "conserve carries the service class in the priority",
    ),
)


def sglang_version() -> str | None:
    """The installed SGLang's version, or None."""
    try:
        return version("sglang")
    except PackageNotFoundError:
        return None


def check_version(found: str | None) -> None:
    """Accept a tested SGLang version.

    Raises:
        IncompatibleError: `found` is None, or was not tested and `CONSERVE_ALLOW_UNTESTED` is
            not 1.
    """
    tested = ", ".join(TESTED_VERSIONS)
    if found is None:
        raise IncompatibleError(
            f"SGLang is not installed: pip install sglang=={TESTED_VERSIONS[0]}"
        )
    if found not in TESTED_VERSIONS and os.environ.get(ALLOW_UNTESTED_ENV) != "1":
        raise IncompatibleError(
            f"SGLang {found} was not tested with conserve (tested: {tested}); install a tested "
            f"version, or set {ALLOW_UNTESTED_ENV}=1 to go on at your own risk"
        )


def check_environment(environment: Mapping[str, str]) -> None:
    """Accept the environment variables that change SGLang's processes.

    Raises:
        IncompatibleError: `SGLANG_RUST_SERVER` is on, or `SGLANG_PLATFORM` names a platform of
            somebody else's.
    """
    platform = environment.get("SGLANG_PLATFORM", "")
    if platform not in ("", "conserve_cpu"):
        raise IncompatibleError(
            f"with SGLANG_PLATFORM={platform} SGLang passes over the plugins of other packages "
            "that bring a platform, conserve's too; unset it"
        )
    if environment.get("SGLANG_RUST_SERVER", "0").lower() in ("1", "true", "yes", "y"):
        raise IncompatibleError(
            "SGLANG_RUST_SERVER replaces the tokenizer process that conserve reads the service "
            "class in; unset it"
        )


def check_workers(workers: int, environment: Mapping[str, str], *, has_batches: bool) -> None:
    """Accept `--tokenizer-worker-num`.

    Raises:
        IncompatibleError: several workers would serve an application of somebody else's, or would
            have batches between them.
    """
    if workers == 1:
        return
    app = environment.get(WORKER_APP_ENV, "")
    if app:
        raise IncompatibleError(
            f"{WORKER_APP_ENV}={app} names what tokenizer workers serve, and in it conserve would "
            "be missing; unset it, or take --tokenizer-worker-num=1"
        )
    if has_batches:
        raise IncompatibleError(
            "batch.storage_dir needs --tokenizer-worker-num=1: batches run in the one HTTP process "
            "of a server; or leave it out, and run files of batches with conserve run-batch"
        )


def conflicts(server_args: Any) -> list[str]:
    """One sentence for each flag of `server_args` (SGLang's ServerArgs) that conserve refuses."""
    return [
        f"{r.flag}={getattr(server_args, r.field)!r} does not go with conserve: {r.reason}"
        for r in _REFUSED
        if r.refuses(getattr(server_args, r.field))
    ]


def check_flags(server_args: Any) -> None:
    """Accept the flags of a server.

    Raises:
        IncompatibleError: listing every flag that conserve refuses.
    """
    if found := conflicts(server_args):
        raise IncompatibleError("; ".join(found))
