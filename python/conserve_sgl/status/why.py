"""The sentence that says what bounds offline work now."""

from __future__ import annotations

from collections.abc import Mapping

from conserve_sgl.policy.bound import Bound
from conserve_sgl.status.record import Kv, Offline, Online, Server, Settings, StepModel, Why

__all__ = ["why"]

_LEAST_STARVED_S = 1.0
_OF_TIME = (Bound.TTFT, Bound.TPOT, Bound.GAP)


def why(
    bound: Bound,
    seconds: Mapping[Bound, float],
    *,
    server: Server,
    settings: Settings,
    online: Online,
    offline: Offline,
    kv: Kv,
    model: StepModel,
) -> Why:
    """What holds offline work back, with the numbers that say so, and what would make room.

    Args:
        bound: what held it longest of late.
        seconds: of late, by bound.
        server, settings, online, offline, kv, model: of the same moment.
    """
    sentences = [
        _reason(bound, server, settings, online, offline, kv),
        _what_runs(bound, offline),
        _late(bound, online),
        _floor(bound, settings),
        _starved(bound, offline),
        _held(settings),
        _unsure(model),
    ]
    return Why(
        bound=str(bound),
        text=" ".join(sentence for sentence in sentences if sentence),
        seconds={str(kind): took_s for kind, took_s in seconds.items()},
    )


def _reason(
    bound: Bound, server: Server, settings: Settings, online: Online, offline: Offline, kv: Kv
) -> str:
    match bound:
        case Bound.NOTHING:
            if not offline.rows and not offline.parked:
                return "Nothing waits: there is no offline work here."
            return "Nothing waits: all offline work that is here runs."
        case Bound.PAUSED:
            return "Offline work is paused until `conserve tune --offline run`."
        case Bound.ENDING:
            return "The server ends: offline requests are answered 503."
        case Bound.ONLINE_PROMPTS:
            waiting = f"{online.waiting} of them now" if online.waiting else "none at this moment"
            return f"Online prompts go first, and no offline work beside them ({waiting})."
        case Bound.ARRIVAL:
            return "Online requests are on their way: nothing offline starts before their prompts."
        case Bound.TTFT:
            return (
                "A longer step would keep an online arrival waiting beyond slo.ttft "
                f"({settings.ttft}); a larger one makes room."
            )
        case Bound.TPOT:
            return (
                f"{_rows(online.rows, 'online')} {_verb(online.rows, 'leaves', 'leave')} no more "
                f"time within slo.tpot ({settings.tpot}); a larger one makes room."
            )
        case Bound.GAP:
            return (
                "A longer step would be a gap that readers notice: slo.longest_gap "
                f"({settings.longest_gap or 'by default twice slo.tpot, at least 50ms'})."
            )
        case Bound.YIELD:
            return (
                "Offline work runs alone, in steps that slo.yield_ms "
                f"({settings.yield_ms:g} ms) keeps short for who may come."
            )
        case Bound.ROWS:
            taken = offline.rows + offline.parked
            return (
                f"No row is free: {online.rows} online and {taken} offline, of {server.rows} and "
                f"at most {server.offline_rows}; a larger --max-running-requests makes room."
            )
        case Bound.KV:
            return (
                f"The KV pool is full: {kv.free + kv.cached:,} of {kv.total:,} tokens are left, "
                f"{kv.reserved:,} reserved to online requests (memory.online_reserve)."
            )
        case Bound.DEVICE:
            return "The device itself: offline work has all that online requests leave of it."


def _what_runs(bound: Bound, offline: Offline) -> str:
    if bound in (Bound.ENDING, Bound.NOTHING) and not offline.waiting:
        return ""
    parked = f", {offline.parked:,} sit out" if offline.parked else ""
    return f"Of offline requests {offline.rows:,} run{parked}, {offline.waiting:,} wait."


def _late(bound: Bound, online: Online) -> str:
    """Outcomes take from what offline work may use; from 0.9 (tpot) and 1 (ttft) down."""
    key = {Bound.TPOT: "tpot", Bound.TTFT: "ttft"}.get(bound, "")
    most = {"tpot": 0.9, "ttft": 1.0}.get(key, 0.0)
    share = online.margins.get(key, most)
    if share > most - 0.05:
        return ""
    return f"Late requests have taken offline work's part of that time to {share:.0%}."


def _floor(bound: Bound, settings: Settings) -> str:
    if not settings.min_share or bound not in _OF_TIME:
        return ""
    return f"offline.min_share gives it {settings.min_share:.0%} of the time in any case."


def _starved(bound: Bound, offline: Offline) -> str:
    if offline.starved_s < _LEAST_STARVED_S or bound.is_at_rest:
        return ""
    return f"None has run for {offline.starved_s:.0f} s."


def _held(settings: Settings) -> str:
    if settings.batches != "hold":
        return ""
    return "Batches are held until `conserve tune --batches run`."


def _unsure(model: StepModel) -> str:
    if not model.is_biased:
        return ""
    way = "longer" if model.bias > 0 else "shorter"
    return (
        f"The latency model is unsure: steps take {abs(model.bias):.0%} {way} than it says "
        "(`conserve profile` measures again)."
    )


def _rows(count: int, kind: str) -> str:
    return f"The {kind} row" if count == 1 else f"The {count:,} {kind} rows"


def _verb(count: int, one: str, many: str) -> str:
    return one if count == 1 else many
