"""The device h100-llama8b-triton from the first H100 run: python scripts/h100_device.py FOLDER OUT.

FOLDER holds SYSTEM.log, SYSTEM.requests.jsonl.gz and SYSTEM.run.json of that run, in which no steps
were logged. A prefill's time is its tokens over the tokens/s of its line, where the line before it
says that more prompts waited: no decode step came between. Decode steps are the means of the 40
between two lines with no prefill between. Mixed steps and short prefills were never timed one by
one; theirs are the costs that the engine fitted to 157 and 89 of them.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np

from conserve_sgl.policy.latency import Coefficients, LatencyModel, StepSample, StepWork
from conserve_sgl.simulate.device import Device, Roofline
from conserve_sgl.simulate.measured import with_steps

LINE = re.compile(
    r"(?P<kind>Prefill|Decode) batch, .*?(?:#new-seq: (?P<prompts>\d+), #new-token: (?P<new>\d+), "
    r"#cached-token: (?P<cached>\d+), token usage: (?P<usage>[0-9.]+), .*?"
    r"#pending-token: (?P<pending>\d+)|#running-req: (?P<rows>\d+), #token: (?P<context>\d+))"
    r".*?cuda graph: (?P<graph>True|False), \w+ throughput \(token/s\): (?P<rate>[0-9.]+)"
)
SYSTEMS = ("offline-only", "online-only")

PARAMETERS, KV_BYTES = 8.03e9, 131_072
BYTES_PER_S, FLOP_PER_S = 3.35e12, 989e12  # HBM3, dense bf16
LLAMA_8B_ON_H100 = Roofline(
    weights_s=2 * PARAMETERS / BYTES_PER_S,
    token_s=2 * PARAMETERS / FLOP_PER_S,
    pair_s=4 * 4096 * 32 / FLOP_PER_S,  # two products of 32 heads of 128, in 32 layers
    context_s=KV_BYTES / BYTES_PER_S,
)
DEVICE = Device(
    name="h100-llama8b-triton",
    gpu="NVIDIA H100 80GB HBM3",
    model="Llama-3.1-8B geometry, bf16",
    backend="triton",
    sglang="0.5.23",
    source="the first H100 run: SGLang's log lines, and for mixed steps the costs fitted to 157",
    layers=32,
    roofline=LLAMA_8B_ON_H100,
    kv_bytes_per_token=KV_BYTES,
    copy_bytes_per_s=40e9,
    decode_graph_rows=(1, 2, 4, 8, 12, *range(16, 257, 8)),
    prefill_graph_tokens=8192,
    # 512 tokens in slices: 27.9 ms for 32 layers, which no longer prompt needs a layer.
    eager_layer_s=0.00087,
    # 31.6 decode steps/s of 163 rows with a prefix of 1,024 beside 12.6 prefills/s of 33 ms.
    repeated_read=0.4,
    steps=(),
)


def main(folder: Path, out: Path) -> None:
    samples = [s for system in SYSTEMS for s in steps_of_log(folder / f"{system}.log")]
    device = with_steps(DEVICE, [*samples, *fitted(folder / "conserve.run.json")])
    gaps = gap_factors(folder / "online-only.requests.jsonl.gz")
    prefill, _, _ = device.noise
    device = msgspec.structs.replace(device, noise=(prefill, gaps, gaps))
    out.write_bytes(msgspec.json.format(msgspec.json.encode(device), indent=1) + b"\n")
    print(f"{out}: {len(device.steps)} steps")


def steps_of_log(path: Path) -> Iterator[StepSample]:
    lines = [found for text in path.read_text().splitlines() if (found := LINE.search(text))]
    for before, line in itertools.pairwise(lines):
        if before["kind"] != line["kind"] or float(line["rate"]) <= 0:
            continue
        if line["kind"] == "Decode":
            rows, context = int(line["rows"]), int(line["context"])
            if int(before["rows"]) == rows:  # none ended: the rate is of so many
                yield StepSample(StepWork(0, 0.0, rows, context, 0), rows / float(line["rate"]))
        elif int(before["pending"]) and float(before["usage"]) < 0.7:
            new, prompts = int(line["new"]), int(line["prompts"])
            pairs = new * (int(line["cached"]) + new / 2) / prompts
            yield StepSample(StepWork(new, pairs, 0, 0, prompts), new / float(line["rate"]))


def fitted(path: Path) -> Iterator[StepSample]:
    counters = json.loads(path.read_text())["counters_after"]
    prefix = "latency.coefficients_s."
    costs = {k.removeprefix(prefix): v for k, v in counters.items() if k.startswith(prefix)}
    model = LatencyModel.of_coefficients(Coefficients(**costs))
    model.coefficients = Coefficients(**costs)
    for work in fitted_shapes():
        yield StepSample(work, model.predict_s(work))


def fitted_shapes() -> Iterator[StepWork]:
    for new, resident in itertools.product((16, 64, 128, 256, 512, 1024, 2048), (0, 1024, 4096)):
        for prompts in (1, 2, 4):
            if new // prompts:
                yield StepWork.of([(new // prompts, resident)] * prompts)
    for new, resident in itertools.product((32, 128, 512, 2048, 4096), (0, 1024, 4096)):
        for rows, context in itertools.product((1, 2, 4, 8, 16, 32, 64, 128), (256, 1024, 4096)):
            yield StepWork.of([(new, resident)], [context] * rows)


def gap_factors(path: Path) -> tuple[float, ...]:
    """Gaps between the tokens of lone requests, over the median of the gaps around each."""
    factors: list[float] = []
    with gzip.open(path) as file:
        for line in file:
            gaps = np.diff(json.loads(line)["chunk_times_s"])
            if len(gaps) < 40:
                continue
            windows = np.lib.stride_tricks.sliding_window_view(gaps, 21)
            factors += (gaps[10:-10] / np.median(windows, axis=1)).tolist()
    values = np.array(factors)
    values = values[(values > 0.8) & (values < 1.3)]  # beyond: two chunks at once, or a prefill
    return tuple(float(f"{q:.4g}") for q in np.quantile(values, np.linspace(0, 1, 41)))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
