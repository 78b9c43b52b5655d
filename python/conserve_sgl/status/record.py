"""The record of a server at a moment: what `GET /conserve/status` answers, and everything shows.

Frozen, and the wire format too: JSON by the names of the fields, steps as arrays. Times of day are
seconds since 1970 (`_s` with the word `at` or `start` in the name), all others are durations.
`None` is what nobody knows yet. A field may be added within a `version`; readers skip what they do
not know.
"""

from __future__ import annotations

import msgspec

__all__ = [
    "VERSION",
    "BatchLine",
    "Capability",
    "Events",
    "HostKv",
    "Job",
    "Kv",
    "Latency",
    "Offline",
    "Online",
    "Server",
    "Settings",
    "Snapshot",
    "Step",
    "StepModel",
    "Why",
]

VERSION = 1


class Server(msgspec.Struct, frozen=True, kw_only=True):
    """Whose record it is.

    Args:
        model: the name under which it is served.
        conserve, sglang: versions.
        host, pid: of the scheduler process.
        started_at_s: when the scheduler was ready.
        rows: requests that may run at a time, and of them at most `offline_rows` offline ones.
        chunk_tokens: prompt tokens of a step at most.
    """

    model: str
    conserve: str
    sglang: str
    host: str
    pid: int
    started_at_s: float
    rows: int
    offline_rows: int
    chunk_tokens: int


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator said, as it holds now (`conserve tune`).

    Args:
        ttft, tpot, longest_gap: objectives as they were written: `500ms`, `2x`, or null.
        yield_ms: `slo.yield_ms`.
        offline: `run`, `pause`, or `end` where the server stops.
        batches: `run` or `hold`.
        min_share: `offline.min_share`.
    """

    ttft: str
    tpot: str
    longest_gap: str | None
    yield_ms: float
    offline: str
    batches: str
    min_share: float


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """One latency of online requests, over the window.

    Args:
        objective_ms: what the objective is now; a relative one once online work was seen.
        p50_ms, p99_ms: to within a hundredth; None without samples.
        samples: requests (TTFT, TPOT) or gaps between tokens (ITL).
        within: share of the samples within the objective.
    """

    objective_ms: float | None
    p50_ms: float | None
    p99_ms: float | None
    samples: int
    within: float | None


class Online(msgspec.Struct, frozen=True, kw_only=True):
    """Online requests.

    Args:
        rows: that decode.
        waiting: whose prompts wait or are computed.
        arriving: announced, and not in the scheduler yet.
        arrivals: announced since the start.
        window_s: seconds that the latencies are of.
        ttft: from announcement to the first token.
        tpot: of a request that ended, for every token after its first.
        itl: between two tokens of a request; the objective is `slo.longest_gap`.
        margins: by objective, `ttft` and `tpot`: of the time to spare, what offline work may use.
    """

    rows: int
    waiting: int
    arriving: int
    arrivals: int
    window_s: float
    ttft: Latency
    tpot: Latency
    itl: Latency
    margins: dict[str, float]


class Offline(msgspec.Struct, frozen=True, kw_only=True):
    """Offline work.

    Args:
        rows: that decode, or compute their prompt.
        parked: that sit out and keep their KV.
        waiting: without a row.
        waiting_tokens: prompt and output tokens that those are expected to take.
        oldest_wait_s: age of the one that arrived first; 0.0 when none waits.
        at_risk: of the waiting, those that will miss their deadline at the present rate.
        starved_s: how long work has waited with none running.
        tokens_per_s: prompt tokens computed and output tokens, in the last half minute or so.
        alone_tokens_per_s: what the engine would do of this work with no online request there, by
            its latency model; None before there was any.
        tokens: since the start, by kind: `computed`, `cached`, `output`.
        accepted, refused, finished, aborted, deadline_missed: requests since the start.
    """

    rows: int
    parked: int
    waiting: int
    waiting_tokens: int
    oldest_wait_s: float
    at_risk: int
    starved_s: float
    tokens_per_s: float | None
    alone_tokens_per_s: float | None
    tokens: dict[str, int]
    accepted: int
    refused: int
    finished: int
    aborted: int
    deadline_missed: int

    @property
    def share(self) -> float | None:
        """Of what the engine would do without online requests, the share that it does."""
        if self.tokens_per_s is None or not self.alone_tokens_per_s:
            return None
        return self.tokens_per_s / self.alone_tokens_per_s


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of one job that have one deadline, as far as they are in the server: clients
    keep most of a job to themselves, and only a batch on the server has a known end (`BatchLine`).

    Args:
        name: of the job; "" is all requests that name none. A batch's is its id.
        waiting, running: requests; those that sit out count as running.
        finished: requests that are done since the job was last without any here.
        waiting_tokens: that the waiting are expected to take.
        deadline_at_s: the earliest; None without.
        done_at_s: when those that are here will be done, at the present rate; None if nobody knows.
    """

    name: str
    waiting: int
    running: int
    finished: int
    waiting_tokens: int
    deadline_at_s: float | None
    done_at_s: float | None


class HostKv(msgspec.Struct, frozen=True, kw_only=True):
    """HiCache's pool on the host, in tokens: used by anyone, and pinned for offline requests."""

    total: int
    used: int
    pinned: int


class Kv(msgspec.Struct, frozen=True, kw_only=True):
    """The device's KV pool, in tokens. `online + offline + cached + free = total`, nearly: a prefix
    that both classes share counts for one of them.

    Args:
        online: of online requests that run.
        offline: of offline requests that hold a row.
        checkpointed: of these, what is in the radix tree and outlives its row.
        cached: of nobody that runs, kept in the radix tree until somebody needs the room.
        free: of nobody.
        reserved: of `free` and `cached`, what offline work leaves to online work now.
        host: the pool on the host; None without HiCache.
    """

    total: int
    online: int
    offline: int
    checkpointed: int
    cached: int
    free: int
    reserved: int
    host: HostKv | None


class Events(msgspec.Struct, frozen=True, kw_only=True):
    """Since the start.

    Args:
        preemptions: an offline request gave up row and KV.
        rows_parked: an offline row was made to sit out.
        chunks_parked: an offline prompt was put aside between two chunks.
        yields: an offline prefill stopped between two layers for online work.
        checkpointed_tokens: KV tokens put into the radix tree while their request ran.
        restored_tokens: that a request which came back found there.
        recomputed_tokens: that it had to compute again.
        host_full: checkpoints that found no room on the host.
    """

    preemptions: int
    rows_parked: int
    chunks_parked: int
    yields: int
    checkpointed_tokens: int
    restored_tokens: int
    recomputed_tokens: int
    host_full: int


class StepModel(msgspec.Struct, frozen=True, kw_only=True):
    """The latency model: median relative error of late (above 0, steps took longer than it said),
    and whether that is off by more than a tenth."""

    bias: float
    is_biased: bool


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds offline work now.

    Args:
        bound: one word of `policy.bound.Bound`, for machines.
        text: the sentence, for people.
        seconds: of the last 10 to 20 seconds, how many each bound held, by its word.
    """

    bound: str
    text: str
    seconds: dict[str, float]


class BatchLine(msgspec.Struct, frozen=True, kw_only=True):
    """A batch on the server that has not ended; its requests are the job of the same name."""

    id: str
    status: str
    total: int
    completed: int
    failed: int
    created_at_s: float
    expires_at_s: float


class Step(msgspec.Struct, frozen=True, array_like=True):
    """One step of the engine. An array in JSON, in this order.

    Args:
        seq: counts steps from the start of the server, without gaps.
        start_s: when it began.
        seconds: how long it took; None while it runs, and where it was not timed.
        idle_s: before it, with nothing to run.
        online_prompt_tokens, online_rows: what of it was online work: prompt tokens computed, and
            rows that decoded.
        offline_prompt_tokens, offline_rows: and offline.
        offline_parked: offline rows that sat it out.
        sliced: whether it was an offline prefill in slices of layers.
        bound: what bounded offline work in it: a word of `policy.bound.Bound`.
        arrivals: online requests announced since the step before.
        preemptions: offline requests that gave up row and KV since then.
        yields: offline prefills that stopped between two layers since then.
    """

    seq: int
    start_s: float
    seconds: float | None
    idle_s: float
    online_prompt_tokens: int
    online_rows: int
    offline_prompt_tokens: int
    offline_rows: int
    offline_parked: int
    sliced: bool
    bound: str
    arrivals: int
    preemptions: int
    yields: int


class Capability(msgspec.Struct, frozen=True):
    """What a server has or lacks beside its queue and budget, as `engine/capabilities.py` decides.

    Args:
        why: it is on or off, as a clause.
        costs: what it takes, or, where it is off, a clause on what comes of that.
    """

    name: str
    on: bool
    why: str
    costs: str

    def __str__(self) -> str:
        said = f"on: {self.why}; costs" if self.on else f"off: {self.why}; so"
        return f"{said} {self.costs}"


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A server at a moment.

    Args:
        at_s: when.
        jobs: those that are done first, at most 50; there are `more_jobs` besides.
        capabilities: what of conserve works with this model and these flags.
        batches: those that have not ended, oldest first; at most 20.
        next_step: `seq` of the step that comes next: ask with `?since=` this.
        steps: the latest, oldest first: those asked for that are still kept.
        has_steps: whether the server keeps any (`status.enabled`).
    """

    version: int = VERSION
    at_s: float
    server: Server
    settings: Settings
    why: Why
    online: Online
    offline: Offline
    jobs: tuple[Job, ...]
    more_jobs: int = 0
    kv: Kv
    events: Events
    model: StepModel
    batches: tuple[BatchLine, ...] = ()
    capabilities: tuple[Capability, ...] = ()
    next_step: int = 0
    steps: tuple[Step, ...] = ()
    has_steps: bool = False
