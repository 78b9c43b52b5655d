"""Steps as a Chrome trace, for chrome://tracing and Perfetto.

A process for each server; in it tracks for steps, yields, preemptions and arrivals, and counters of
rows. The format is JSON of the Trace Event Format: complete events (`X`), instants (`i`), counters
(`C`) and names (`M`); times are microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from conserve_sgl.status.fetch import Seen
from conserve_sgl.status.kinds import kind_of
from conserve_sgl.status.record import Step

__all__ = ["chrome_trace"]

_TRACKS = ("steps", "yields", "preemptions", "arrivals")
_COLORS = {
    "online prompts": "rail_response",
    "online rows": "thread_state_running",
    "online and offline rows": "good",
    "offline rows": "thread_state_runnable",
}


def chrome_trace(looks: Iterable[Seen]) -> dict[str, Any]:
    """The trace of all steps of `looks`, each once; they may be of several servers."""
    pids: dict[str, int] = {}
    seen: set[tuple[str, float, int]] = set()
    events: list[dict[str, Any]] = []
    for one in looks:
        if one.snapshot is None:
            continue
        server = one.snapshot.server
        if one.endpoint not in pids:
            pids[one.endpoint] = len(pids) + 1
            events += _names(pids[one.endpoint], f"{one.endpoint} {server.model}")
        for step in one.snapshot.steps:
            key = (one.endpoint, server.started_at_s, step.seq)
            if key not in seen:
                seen.add(key)
                events += _step(pids[one.endpoint], step)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _names(pid: int, name: str) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}
    for tid, track in enumerate(_TRACKS, start=1):
        args = {"name": track}
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": args}
        order = {"sort_index": tid}
        yield {"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": order}


def _step(pid: int, step: Step) -> Iterator[dict[str, Any]]:
    start_us = step.start_s * 1e6
    kind = kind_of(step)
    if step.seconds is not None:
        event = {
            "ph": "X",
            "pid": pid,
            "tid": 1,
            "name": kind,
            "ts": start_us,
            "dur": step.seconds * 1e6,
            "args": {
                "step": step.seq,
                "online prompt tokens": step.online_prompt_tokens,
                "online rows": step.online_rows,
                "offline prompt tokens": step.offline_prompt_tokens,
                "offline rows": step.offline_rows,
                "offline rows that sit out": step.offline_parked,
                "bound": step.bound,
            },
        }
        yield event | ({"cname": _COLORS[kind]} if kind in _COLORS else {})
    for tid, count in ((2, step.yields), (3, step.preemptions), (4, step.arrivals)):
        if count:
            name = _TRACKS[tid - 1]
            args = {"count": count}
            yield {
                "ph": "i",
                "s": "t",
                "pid": pid,
                "tid": tid,
                "name": name,
                "ts": start_us,
                "args": args,
            }
    rows = {
        "online": step.online_rows,
        "offline": step.offline_rows,
        "sit out": step.offline_parked,
    }
    yield {"ph": "C", "pid": pid, "name": "rows", "ts": start_us, "args": rows}
