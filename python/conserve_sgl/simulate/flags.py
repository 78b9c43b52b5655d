"""The flags of SGLang that decide what the simulated server does; others are refused by name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import msgspec

from conserve_sgl.simulate.stock import Limits, StockOptions

__all__ = ["ServerFlags"]

_DECIDE_NOTHING = (
    "--attention-backend",
    "--hicache-ratio",
    "--hicache-size",
    "--hicache-write-policy",
    "--load-format",
    "--mem-fraction-static",
    "--model-path",
    "--sampling-backend",
)
"""With a value. The backend and the model are the device's."""

_DECIDE_NOTHING_BARE = ("--skip-tokenizer-init", "--enable-metrics")


class ServerFlags(msgspec.Struct, frozen=True, kw_only=True):
    """What a server's flags say.

    Args:
        limits: of its steps and pools.
        options: of its scheduler, as far as they do not depend on the requests.
        overlap: whether scheduling and forward overlap.
        hicache: whether KV may be kept on the host.
    """

    limits: Limits
    options: StockOptions
    overlap: bool
    hicache: bool

    @classmethod
    def of(cls, flags: Sequence[str]) -> ServerFlags:
        """Read `flags`; of one that is given twice the last counts.

        Raises:
            ValueError: one is unknown to the simulator, or has no good value.
        """
        try:
            found, unknown = _PARSER.parse_known_args(list(flags))
        except argparse.ArgumentError as e:
            raise ValueError(str(e)) from e
        if unknown:
            raise ValueError(f"the simulator does not know the flag {unknown[0]}")
        limits = Limits(
            kv_tokens=found.max_total_tokens,
            rows=found.max_running_requests,
            chunk_tokens=found.chunked_prefill_size,
        )
        options = StockOptions(
            priority=found.enable_priority_scheduling,
            mixed_chunk=found.enable_mixed_chunk,
            prefill_decode_interval=found.prefill_decode_interval,
            prefill_decode_interval_min_bs=found.prefill_decode_interval_min_bs,
            retract_offline_first=found.retraction_policy == "priority",
        )
        return cls(
            limits=limits,
            options=options,
            overlap=not found.disable_overlap_schedule,
            hicache=found.enable_hierarchical_cache,
        )


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _natural(text: str) -> int:
    return 0 if text == "0" else _count(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    defaults = Limits()
    parser.add_argument("--max-total-tokens", type=_count, default=defaults.kv_tokens)
    parser.add_argument("--max-running-requests", type=_count, default=defaults.rows)
    parser.add_argument("--chunked-prefill-size", type=_count, default=defaults.chunk_tokens)
    parser.add_argument("--prefill-decode-interval", type=_natural, default=0)
    parser.add_argument("--prefill-decode-interval-min-bs", type=_natural, default=0)
    parser.add_argument("--default-priority-value", type=int, default=0)
    parser.add_argument("--retraction-policy", choices=("length", "priority"), default="length")
    for flag in (
        "--enable-priority-scheduling",
        "--enable-mixed-chunk",
        "--enable-hierarchical-cache",
        "--disable-overlap-schedule",
        *_DECIDE_NOTHING_BARE,
    ):
        parser.add_argument(flag, action="store_true")
    for flag in _DECIDE_NOTHING:
        parser.add_argument(flag)
    return parser


_PARSER = _parser()
