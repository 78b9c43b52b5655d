"""The devices h100-llama8b-*: python scripts/h100_devices.py STEPS-TRITON STEPS-FA3.

Each file holds steps of one H100, measured shape by shape as CONSERVE_STEP_LOG writes them, with
one attention backend of SGLang. What a step log cannot say stands here, with where it is from.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from conserve_sgl.device.measured import launch_times, with_steps
from conserve_sgl.device.table import Costs, Device
from conserve_sgl.profile.steps import read_steps

DEVICES = Path(__file__).parent.parent / "python" / "conserve_sgl" / "device" / "shipped"

PARAMETERS, KV_BYTES = 8.03e9, 131_072
BYTES_PER_S, FLOP_PER_S = 3.35e12, 989e12  # HBM3, dense bf16
ROOFLINE = Costs(
    least_s=2 * PARAMETERS / BYTES_PER_S,
    token_s=2 * PARAMETERS / FLOP_PER_S,
    pair_s=4 * 4096 * 32 / FLOP_PER_S,  # two products of 32 heads of 128, in 32 layers
    row_s=0.0,
    context_s=KV_BYTES / BYTES_PER_S,
)
DEVICE = Device(
    name="",
    gpu="NVIDIA H100 80GB HBM3",
    model="Llama-3.1-8B geometry, bf16",
    backend="",
    sglang="0.5.23",
    source="360 steps of 299 shapes, 2026-11-26",
    layers=32,
    costs=ROOFLINE,
    kv_bytes_per_token=KV_BYTES,
    # A resume of 8,191 tokens, 4,607 of them on the host: 43 ms against 45 ms for 1,024.
    copy_bytes_per_s=40e9,
    # The third run: 416 copies of 800 tokens and more (docs/kv-checkpoints.md).
    copy_holds_s=7.5e-6,
    decode_graph_rows=(1, 2, 4, 8, 12, *range(16, 257, 8)),
    prefill_graph_tokens=8192,
    # 512 tokens in slices: 27.9 ms for 32 layers, which no longer prompt needs a layer.
    eager_layer_s=0.00087,
    # The first run: 31.6 decode steps/s of 163 rows with a prefix of 1,024, and 12.6 prefills/s.
    repeated_read=0.7,
    steps=(),
)
DECODE_LAUNCH_S = 0.002


def main(triton: Path, fa3: Path) -> None:
    for backend, path in (("triton", triton), ("fa3", fa3)):
        name, samples = f"h100-llama8b-{backend}", read_steps(path)
        launch_s = launch_times(samples, DECODE_LAUNCH_S)
        device = msgspec.structs.replace(DEVICE, name=name, backend=backend, launch_s=launch_s)
        device = with_steps(device, samples)
        out = DEVICES / f"{name}.json"
        out.write_bytes(msgspec.json.encode(device) + b"\n")
        launches = ", ".join(f"{1e3 * s:.1f}" for s in launch_s)
        print(f"{out.name}: {len(device.steps)} steps; launches of {launches} ms")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
