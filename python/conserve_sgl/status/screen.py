"""A server's record on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from conserve_sgl.status.fetch import Seen
from conserve_sgl.status.kinds import shares
from conserve_sgl.status.record import Job, Kv, Latency, Snapshot

__all__ = ["span", "whole_screen"]

_MOST_JOBS = 12


def whole_screen(seen: Sequence[Seen]) -> RenderableType:
    """One server in full, several as a table with what bounds each."""
    return _one(seen[0]) if len(seen) == 1 else _several(seen)


def span(seconds: float) -> str:
    """A duration as people say it: `45 s`, `12 min`, `3.5 h`, `2.0 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"


# ------------------------------------------------------------------------ one server


def _one(seen: Seen) -> RenderableType:
    if seen.snapshot is None:
        return _fault(seen)
    record, server = seen.snapshot, seen.snapshot.server
    up = span(max(record.at_s - server.started_at_s, 0.0))
    head = f"{seen.endpoint}  {server.model}, up {up}, SGLang {server.sglang}"
    parts: list[RenderableType] = [
        Text(head, style="bold", overflow="fold"),
        Text(record.why.text, style="yellow", overflow="fold"),
        Text(_settings_line(record), overflow="fold"),
        _latencies(record),
        Text(_offline_line(record), overflow="fold"),
        Text(_kv_line(record.kv), overflow="fold"),
        Text(_events_line(record), overflow="fold"),
    ]
    if record.steps:
        parts.append(Text(_steps_line(record), overflow="fold"))
    if record.jobs:
        parts.append(_jobs(record))
    return Group(*parts)


def _fault(seen: Seen) -> Text:
    text = seen.fault or ""
    text = text if text.startswith(seen.endpoint) else f"{seen.endpoint}: {text}"
    return Text(text, style="red" if seen.is_ == "down" else "dim", overflow="fold")


def _settings_line(record: Snapshot) -> str:
    now = record.settings
    gap = "" if now.longest_gap is None else f", longest_gap {now.longest_gap}"
    share = f", min_share {now.min_share:g}" if now.min_share else ""
    return (
        f"settings: ttft {now.ttft}, tpot {now.tpot}{gap}, yield_ms {now.yield_ms:g}{share}; "
        f"offline {now.offline}, batches {now.batches}"
    )


def _latencies(record: Snapshot) -> RenderableType:
    online = record.online
    rows = f"{online.rows} rows, {online.waiting} waiting, {online.arriving} arriving"
    if not record.has_steps:
        return Text(f"online: {rows} (latencies need `status: {{enabled: true}}`)")
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(f"online, last {span(online.window_s)}")
    for name in ("P50", "P99", "objective", "within", "samples"):
        table.add_column(name, justify="right")
    for name, latency in (("TTFT", online.ttft), ("TPOT", online.tpot), ("ITL", online.itl)):
        table.add_row(name, *_latency_cells(latency))
    return Group(table, Text(f"online: {rows}", overflow="fold"))


def _latency_cells(latency: Latency) -> list[str | Text]:
    within = "-" if latency.within is None else f"{latency.within:.1%}"
    late = latency.within is not None and latency.within < 0.99
    return [
        _ms(latency.p50_ms),
        _ms(latency.p99_ms),
        _ms(latency.objective_ms),
        Text(within, style="red" if late else ""),
        f"{latency.samples:,}",
    ]


def _ms(milliseconds: float | None) -> str:
    if milliseconds is None:
        return "-"
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.1f} ms"


def _offline_line(record: Snapshot) -> str:
    offline = record.offline
    parked = f", {offline.parked:,} sit out" if offline.parked else ""
    oldest = f" (the oldest for {span(offline.oldest_wait_s)})" if offline.waiting else ""
    risk = f", {offline.at_risk:,} will be late" if offline.at_risk else ""
    return (
        f"offline: {_speed(record)}; {offline.rows:,} run{parked}, {offline.waiting:,} wait{oldest}"
        f"{risk}; {offline.finished:,} done"
    )


def _speed(record: Snapshot) -> str:
    offline = record.offline
    if offline.tokens_per_s is None:
        return "- tokens/s"
    share = offline.share
    alone = "" if share is None else f", {share:.0%} of {offline.alone_tokens_per_s:,.0f} alone"
    return f"{offline.tokens_per_s:,.0f} tokens/s{alone}"


def _kv_line(kv: Kv) -> str:
    def part(tokens: int) -> str:
        return f"{tokens / max(kv.total, 1):.0%}"

    host = ""
    if kv.host is not None:
        host = f"; host {kv.host.used / max(kv.host.total, 1):.0%} of {kv.host.total:,}"
    return (
        f"kv of {kv.total:,} tokens: online {part(kv.online)}, offline {part(kv.offline)} "
        f"({part(kv.checkpointed)} checkpointed), cached {part(kv.cached)}, free {part(kv.free)}"
        f"{host}"
    )


def _events_line(record: Snapshot) -> str:
    events = record.events
    return (
        f"since the start: {events.preemptions:,} preemptions, {events.yields:,} yields, "
        f"{events.rows_parked:,} rows sat out; of what gave way {events.restored_tokens:,} tokens "
        f"were found again, {events.recomputed_tokens:,} computed again"
    )


def _steps_line(record: Snapshot) -> str:
    steps = record.steps
    seconds = sum((step.seconds or 0.0) + step.idle_s for step in steps)
    parts = ", ".join(f"{kind} {share:.0%}" for kind, share in shares(steps).items())
    return f"the last {len(steps):,} steps, {span(seconds)}: {parts}"


def _jobs(record: Snapshot) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("job", overflow="fold")
    for name in ("waiting", "running", "done", "due in", "done in"):
        table.add_column(name, justify="right")
    for job in record.jobs[:_MOST_JOBS]:
        table.add_row(*_job_cells(record, job))
    more = len(record.jobs) + record.more_jobs - min(len(record.jobs), _MOST_JOBS)
    if more:
        table.add_row(f"and {more:,} more")
    return table


def _job_cells(record: Snapshot, job: Job) -> list[str | Text]:
    batch = next((batch for batch in record.batches if batch.id == job.name), None)
    done = f"{job.finished:,}"
    if batch is not None and batch.total:
        done = f"{batch.completed + batch.failed:,} of {batch.total:,}"
    due, will = job.deadline_at_s, job.done_at_s
    late = due is not None and will is not None and will > due
    return [
        _plain(job.name or "(no name)"),
        f"{job.waiting:,}",
        f"{job.running:,}",
        done,
        "-" if due is None else _until(due - record.at_s),
        Text("-" if will is None else _until(will - record.at_s), style="red" if late else ""),
    ]


def _plain(name: str) -> Text:
    """What a client sent, which is no markup and moves no cursor."""
    return Text("".join(c if c.isprintable() else "?" for c in name))


def _until(seconds: float) -> str:
    return span(seconds) if seconds >= 0 else f"{span(-seconds)} ago"


# ------------------------------------------------------------------------ several


def _several(seen: Sequence[Seen]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("server", overflow="fold")
    for name in ("TTFT P99", "TPOT P99", "online", "offline", "waiting", "tokens/s", "of alone"):
        table.add_column(name, justify="right")
    lines: list[RenderableType] = []
    for one in seen:
        record = one.snapshot
        if record is None:
            lines.append(_fault(one))
            continue
        online, offline = record.online, record.offline
        table.add_row(
            _plain(one.endpoint),
            _ms(online.ttft.p99_ms),
            _ms(online.tpot.p99_ms),
            f"{online.rows:,}",
            f"{offline.rows:,}",
            f"{offline.waiting:,}",
            "-" if offline.tokens_per_s is None else f"{offline.tokens_per_s:,.0f}",
            "-" if offline.share is None else f"{offline.share:.0%}",
        )
        lines.append(Text(f"{one.endpoint}: {record.why.text}", overflow="fold"))
    return Group(table, *lines) if table.rows else Group(*lines)
