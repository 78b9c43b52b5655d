"""What runs beside what on a GPU: do checkpoints and loads overlap with the steps of the model?

    python -m conserve_sgl.bench.micro.overlap --model DIR [--trace FILE] [-- SGLANG FLAGS]

Starts a server with a host cache whose KV pool offline work outgrows, sends long offline prompts
and short online ones, and lets SGLang's profiler record some hundred steps of it. Prints Markdown:
for every stream of the device how long it was busy, and for how much of that the stream that
computes was busy too. With `--trace` it reads a trace that is there and starts nothing.
"""

from __future__ import annotations

import argparse
import gzip
import random
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import msgspec

from conserve_sgl.bench.report.tables import markdown
from conserve_sgl.bench.systems.server import serving, split_flags
from conserve_sgl.client.headers import OFFLINE_HEADERS
from conserve_sgl.errors import ConserveError, InputError

__all__ = ["Stream", "main", "read_streams", "table"]

_DEVICE_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_CONFIG = "memory: {online_reserve: 0.1}"
_POOL_TOKENS = 65_536
_FLAGS = ("--enable-hierarchical-cache", "--hicache-write-policy=write_through")
_OFFLINE_REQUESTS, _PROMPT_TOKENS, _OUTPUT_TOKENS = 48, 3000, 256
_TOKEN_IDS = range(100, 30_000)
_WARM_S, _LONGEST_S, _STEPS = 5.0, 120.0, 300
_HTTP_S = 300.0
_NOTHING = "The trace holds no work of a GPU."


class Stream(msgspec.Struct, frozen=True):
    """One stream of the device.

    Args:
        number: as the driver counts them.
        operations: kernels and copies.
        busy_s: when at least one of them ran.
        beside_s: of that, when the computing stream was busy as well.
        most: the kind of operation that took most of the time.
    """

    number: int
    operations: int
    busy_s: float
    beside_s: float
    most: str


class _Event(msgspec.Struct):
    ph: str = ""
    cat: str = ""
    name: str = ""
    ts: float = 0.0
    dur: float = 0.0
    args: dict = {}


class _Trace(msgspec.Struct):
    traceEvents: list[_Event]


Spans = list[tuple[float, float]]


def read_streams(path: Path) -> list[Stream]:
    """The streams in a trace of torch's profiler, `.json` or `.json.gz`, the busiest first.

    Raises:
        InputError: it is no such trace.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        events = msgspec.json.decode(data, type=_Trace).traceEvents
    except (OSError, EOFError, msgspec.DecodeError) as error:
        raise InputError(path, f"is no trace of torch's profiler: {error}") from error
    by_stream: dict[int, list[_Event]] = defaultdict(list)
    for event in events:
        if event.ph == "X" and event.cat in _DEVICE_WORK:
            by_stream[event.args.get("stream", 0)].append(event)
    spans = {number: _union(work) for number, work in by_stream.items()}
    ranked = sorted(spans, key=lambda number: -_length(spans[number]))
    return [
        Stream(
            number=number,
            operations=len(by_stream[number]),
            busy_s=_length(spans[number]) / 1e6,
            beside_s=_shared(spans[number], spans[ranked[0]]) / 1e6,
            most=_most(by_stream[number]),
        )
        for number in ranked
    ]


def _union(events: Iterable[_Event]) -> Spans:
    spans: Spans = []
    for start, end in sorted((e.ts, e.ts + e.dur) for e in events):
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], end))
        else:
            spans.append((start, end))
    return spans


def _length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def _shared(one: Spans, other: Spans) -> float:
    shared, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        shared += max(min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]), 0.0)
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return shared


def _most(events: Iterable[_Event]) -> str:
    took: dict[str, float] = defaultdict(float)
    for event in events:
        took[event.name.partition("<")[0].partition("(")[0].strip()] += event.dur
    return max(took, key=took.__getitem__)


def table(streams: Sequence[Stream]) -> str:
    """The streams as a Markdown table."""
    if not streams:
        return f"{_NOTHING}\n"
    return markdown(
        [
            {
                "stream": f"{s.number}",
                "operations": f"{s.operations:,}",
                "busy": f"{s.busy_s * 1e3:,.1f} ms",
                "beside the computing stream": "it is this one" if s is streams[0] else _share(s),
                "mostly": f"`{s.most[:60]}`",
            }
            for s in streams
        ]
    )


def _share(stream: Stream) -> str:
    return f"{stream.beside_s / stream.busy_s:.0%}"


# ---------------------------------------------------------------------- the load


def _offline(http: httpx.Client, chance: random.Random) -> None:
    """Long prompts, all at a time: more KV than the pool holds."""
    sampling = {"temperature": 0, "max_new_tokens": _OUTPUT_TOKENS, "ignore_eos": True}
    bodies = [
        {"input_ids": chance.choices(_TOKEN_IDS, k=_PROMPT_TOKENS), "sampling_params": sampling}
        for _ in range(_OFFLINE_REQUESTS)
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        for answer in pool.map(
            lambda body: http.post("/generate", json=body, headers=OFFLINE_HEADERS), bodies
        ):
            answer.raise_for_status()


def _online(http: httpx.Client, done: threading.Event) -> None:
    chance = random.Random(1)
    sampling = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    while not done.wait(chance.uniform(0.0, 0.5)):
        body = {"input_ids": chance.choices(_TOKEN_IDS, k=64), "sampling_params": sampling}
        http.post("/generate", json=body).raise_for_status()


def _record(http: httpx.Client, folder: Path, activities: Sequence[str]) -> Path:
    """The trace of some hundred steps."""
    body = {"output_dir": str(folder), "num_steps": _STEPS, "activities": list(activities)}
    http.post("/start_profile", json=body).raise_for_status()
    until_s = time.monotonic() + _LONGEST_S
    while time.monotonic() < until_s:
        for path in folder.glob("*.trace.json.gz"):
            size = path.stat().st_size
            time.sleep(2.0)  # it is written for a while
            if size and size == path.stat().st_size:
                return path
        time.sleep(0.5)
    raise ConserveError(f"no trace came in {_LONGEST_S:.0f} s")


def _measure(model: Path, folder: Path, flags: Sequence[str], activities: Sequence[str]) -> Path:
    flags = (*_FLAGS, f"--max-total-tokens={_POOL_TOKENS}", *flags)
    with (
        serving(model, _CONFIG, flags) as server,
        httpx.Client(base_url=server.base_url, timeout=_HTTP_S) as http,
        ThreadPoolExecutor(2) as pool,
    ):
        done = threading.Event()
        work = [pool.submit(_offline, http, random.Random(0)), pool.submit(_online, http, done)]
        try:
            time.sleep(_WARM_S)
            path = _record(http, folder, activities)
            work[0].result()
        finally:
            done.set()
        work[1].result()
        return path


def main(argv: list[str] | None = None) -> None:
    """The command; see the module's text."""
    parser = argparse.ArgumentParser(description="What runs beside what on a GPU.")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--trace", type=Path, help="read this one instead")
    parser.add_argument("--out", type=Path, help="keep table and trace in this folder")
    parser.add_argument("--activities", nargs="+", default=["GPU"], help="of SGLang's profiler")
    options, flags = split_flags(argv)
    given = parser.parse_args(options)
    if given.trace is not None:
        print(table(read_streams(given.trace)), end="")
        return
    if given.model is None:
        parser.error("give --model or --trace")
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        trace = _measure(given.model, folder.resolve(), flags, given.activities)
        text = table(read_streams(trace))
        print(text, end="")
        (folder / "overlap.md").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
