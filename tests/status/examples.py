"""A record to test with."""

from __future__ import annotations

import msgspec

from conserve_sgl.policy import Bound
from conserve_sgl.status.record import (
    Events,
    Job,
    Kv,
    Latency,
    Offline,
    Online,
    Server,
    Settings,
    Snapshot,
    Step,
    StepModel,
    Why,
)

SERVER = Server(
    model="tiny",
    conserve="0.1.0",
    sglang="0.5.23",
    host="gpu-7",
    pid=42,
    started_at_s=1000.0,
    rows=256,
    offline_rows=224,
    chunk_tokens=8192,
)
SETTINGS = Settings(
    ttft="500ms",
    tpot="25ms",
    longest_gap=None,
    yield_ms=5.0,
    offline="run",
    batches="run",
    min_share=0.0,
)
SEEN = Latency(objective_ms=500.0, p50_ms=54.2, p99_ms=158.1, samples=412, within=0.98)
ONLINE = Online(
    rows=12,
    waiting=1,
    arriving=0,
    arrivals=18234,
    window_s=300.0,
    ttft=SEEN,
    tpot=SEEN,
    itl=SEEN,
    margins={"ttft": 1.0, "tpot": 0.9},
)
OFFLINE = Offline(
    rows=40,
    parked=8,
    waiting=144,
    waiting_tokens=210_344,
    oldest_wait_s=1834.2,
    at_risk=3,
    starved_s=0.0,
    tokens_per_s=14_000.0,
    alone_tokens_per_s=20_000.0,
    tokens={"computed": 10, "cached": 5, "output": 3},
    accepted=9321,
    refused=12,
    finished=9129,
    aborted=0,
    deadline_missed=1,
)
KV = Kv(
    total=1000,
    online=100,
    offline=400,
    checkpointed=250,
    cached=300,
    free=200,
    reserved=150,
    host=None,
)
JOB = Job(
    name="nightly",
    waiting=100,
    running=40,
    finished=5200,
    waiting_tokens=150_000,
    deadline_at_s=9000.0,
    done_at_s=9600.0,
)
MODEL = StepModel(bias=0.02, is_biased=False)
RECORD = Snapshot(
    at_s=5000.0,
    server=SERVER,
    settings=SETTINGS,
    why=Why(bound="slo.tpot", text="The rows leave no more time.", seconds={"slo.tpot": 9.0}),
    online=ONLINE,
    offline=OFFLINE,
    jobs=(JOB,),
    kv=KV,
    events=Events(
        preemptions=211,
        rows_parked=5120,
        chunks_parked=31,
        yields=77,
        checkpointed_tokens=1_200_000,
        restored_tokens=180_000,
        recomputed_tokens=9100,
        host_full=0,
    ),
    model=MODEL,
    has_steps=True,
)


def changed(record: msgspec.Struct, **fields: object):
    return msgspec.structs.replace(record, **fields)


def step(seq: int, **fields: object) -> Step:
    """A step of 20 ms, the `seq`-th from 5000.0 on."""
    plain = Step(
        seq=seq,
        start_s=5000.0 + 0.02 * seq,
        seconds=0.02,
        idle_s=0.0,
        online_prompt_tokens=0,
        online_rows=0,
        offline_prompt_tokens=0,
        offline_rows=0,
        offline_parked=0,
        sliced=False,
        bound=str(Bound.TPOT),
        arrivals=0,
        preemptions=0,
        yields=0,
    )
    return changed(plain, **fields)


def record_of(*seqs: int, **fields: object) -> Snapshot:
    """A record with these steps, after which the next one comes."""
    steps = tuple(step(seq) for seq in seqs)
    known = {"steps": steps, "next_step": max(seqs, default=-1) + 1}
    return changed(RECORD, **(known | fields))
