"""Time the attention backends `torch_native` and `conserve_cpu` side by side.

    python -m conserve_sgl.platform.compare                 attention of one layer, no engine
    python -m conserve_sgl.platform.compare --model DIR     also whole engines on that model

Prints Markdown. In every case the two backends take turns, so that other load on the machine falls
on both; a ratio is torch_native's median time over ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conserve_sgl.platform import SPIN_COUNT

__all__ = ["main"]

# SmolLM2-135M's attention.
_Q_HEADS, _KV_HEADS, _HEAD_DIM = 9, 3, 64
_LAYERS = 4
_BACKENDS = ("torch_native", "conserve_cpu")
_EXTENDS = ((512, 0), (2048, 0), (128, 2048), (1, 2048), (1, 4096))
_DECODES = tuple((batch, context) for context in (256, 1024) for batch in (1, 8, 32, 64))
_PROMPT_TOKENS, _NEW_TOKENS = 512, 64


@dataclass(frozen=True)
class _Load:
    """One batch: `requests` holds (cached, new) tokens of each request."""

    name: str
    decode: bool
    requests: tuple[tuple[int, int], ...]


class _Pool:
    """The KV of one layer, without SGLang's checks around it."""

    def __init__(self, slots: int, dtype: Any) -> None:
        import torch

        self.k = torch.randn(slots, _KV_HEADS, _HEAD_DIM, dtype=dtype)
        self.v = torch.randn(slots, _KV_HEADS, _HEAD_DIM, dtype=dtype)

    def get_key_buffer(self, _layer_id: int) -> Any:
        return self.k

    def get_value_buffer(self, _layer_id: int) -> Any:
        return self.v

    def set_kv_buffer(self, _layer: Any, loc: Any, k: Any, v: Any) -> None:
        self.k[loc.loc], self.v[loc.loc] = k, v


def main(argv: list[str] | None = None) -> None:
    """Run the comparison; `argv` defaults to the command line."""
    parser = argparse.ArgumentParser(prog="conserve_sgl.platform.compare", description=__doc__)
    parser.add_argument("--samples", type=int, default=9, help="timings per case and backend")
    parser.add_argument("--model", type=Path, help="also run engines on this model folder")
    parser.add_argument("--rounds", type=int, default=2, help="engines per backend")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    _set_environment()
    if args.engine:
        print(json.dumps(_run_engine(args.model, args.engine)))
        return
    _print_machine()
    _print_attention(args.samples)
    if args.model:
        _print_engines(args.model, args.rounds)


def _set_environment() -> None:
    # The OpenMP runtime reads it when it is loaded, so torch must not be there yet.
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    os.environ["SGLANG_PLATFORM"] = "conserve_cpu"


def _print_machine() -> None:
    from importlib.metadata import version

    import torch

    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    print(f"- {_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads")
    print(f"- torch {torch.__version__}, sglang {version('sglang')}, {platform.python_version()}")
    print(f"- GOMP_SPINCOUNT={os.environ['GOMP_SPINCOUNT']}, load average {load} at the start\n")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _print_attention(samples: int) -> None:
    import torch

    print("| one layer | dtype | torch_native ms | conserve_cpu ms | ratio |")
    print("|---|---|---:|---:|---:|")
    for dtype in (torch.bfloat16, torch.float32):
        for load in _loads():
            native, ours = _medians_ms(load, dtype, samples)
            name = str(dtype).removeprefix("torch.")
            row = f"{load.name} | {name} | {native:.3f} | {ours:.3f} | {native / ours:.1f}x"
            print(f"| {row} |", flush=True)


def _loads() -> Iterator[_Load]:
    for new, cached in _EXTENDS:
        yield _Load(f"extend {new} over {cached}", False, ((cached, new),))
    for batch, context in _DECODES:
        yield _Load(f"decode {batch} at {context}", True, ((context - 1, 1),) * batch)


def _medians_ms(load: _Load, dtype: Any, samples: int) -> list[float]:
    steps = [_step(backend, load, dtype) for backend in _backend_classes()]
    times: list[list[float]] = [[] for _ in steps]
    for sample in range(samples + 1):
        for step, taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            step()
            if sample:  # the first warms up
                taken.append((time.perf_counter() - start) * 1e3 / _LAYERS)
    return [statistics.median(taken) for taken in times]


def _backend_classes() -> tuple[type, type]:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    from conserve_sgl.platform.attention import CpuAttnBackend

    return TorchNativeAttnBackend, CpuAttnBackend


def _step(backend_cls: type, load: _Load, dtype: Any) -> Callable[[], None]:
    """Planning and a few layers of attention over one batch, KV written as in a real step."""
    import torch

    torch.manual_seed(0)
    batch, runner = _batch_and_runner(load, dtype)
    backend, layer = backend_cls(runner), _layer()
    rows = sum(new for _, new in load.requests)
    q = torch.randn(rows, _Q_HEADS * _HEAD_DIM, dtype=dtype)
    k, v = (torch.randn(rows, _KV_HEADS, _HEAD_DIM, dtype=dtype) for _ in range(2))
    forward = backend.forward_decode if load.decode else backend.forward_extend

    @torch.inference_mode()
    def step() -> None:
        backend.init_forward_metadata(batch)
        for _ in range(_LAYERS):
            forward(q, k, v, layer, batch)

    return step


def _batch_and_runner(load: _Load, dtype: Any) -> tuple[SimpleNamespace, SimpleNamespace]:
    import torch
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    cached, new = (torch.tensor(x) for x in zip(*load.requests, strict=True))
    contexts, requests = cached + new, len(load.requests)
    longest = int(contexts.max())
    table = torch.randperm(requests * longest, dtype=torch.int32).view(requests, longest) + 1
    written = [table[i, c : c + n] for i, (c, n) in enumerate(load.requests)]
    batch = SimpleNamespace(
        forward_mode=ForwardMode.DECODE if load.decode else ForwardMode.EXTEND,
        req_pool_indices=torch.arange(requests),
        seq_lens=contexts,
        extend_prefix_lens=cached,
        extend_seq_lens=new,
        encoder_lens=None,
        out_cache_loc=torch.cat(written).long(),
    )
    runner = SimpleNamespace(
        device="cpu",
        dtype=dtype,
        use_mla_backend=False,
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        token_to_kv_pool=_Pool(table.numel() + 1, dtype),
    )
    return batch, runner


def _layer() -> SimpleNamespace:
    from sglang.srt.layers.radix_attention import AttentionType

    return SimpleNamespace(
        layer_id=0,
        qk_head_dim=_HEAD_DIM,
        v_head_dim=_HEAD_DIM,
        tp_q_head_num=_Q_HEADS,
        tp_k_head_num=_KV_HEADS,
        scaling=_HEAD_DIM**-0.5,
        is_cross_attention=False,
        sliding_window_size=-1,
        attn_type=AttentionType.DECODER,
    )


def _print_engines(model: Path, rounds: int) -> None:
    results: dict[str, list[dict[str, float]]] = {backend: [] for backend in _BACKENDS}
    for _ in range(rounds):
        for backend in _BACKENDS:
            results[backend].append(_engine_in_a_process(model, backend))
    print(f"\n| {model.name}, tokens per second | torch_native | conserve_cpu | ratio |")
    print("|---|---:|---:|---:|")
    for case in results[_BACKENDS[0]][0]:
        native, ours = (statistics.median(r[case] for r in results[b]) for b in _BACKENDS)
        print(f"| {case} | {native:.1f} | {ours:.1f} | {ours / native:.2f}x |")


def _engine_in_a_process(model: Path, backend: str) -> dict[str, float]:
    command = [sys.executable, "-m", __spec__.name, "--model", str(model), "--engine", backend]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _run_engine(model: Path, backend: str) -> dict[str, float]:
    import sglang

    engine = sglang.Engine(
        model_path=str(model),
        attention_backend=backend,
        disable_radix_cache=True,
        log_level="error",
        random_seed=0,
    )
    try:
        _rate(engine, 1, 32, 8)
        return {
            f"prefill, {_PROMPT_TOKENS} tokens": _rate(engine, 1, _PROMPT_TOKENS, 1),
            f"prefill, 8 x {_PROMPT_TOKENS} tokens": _rate(engine, 8, _PROMPT_TOKENS, 1),
            "decode, batch 1, from 64 tokens": _rate(engine, 1, 64, _NEW_TOKENS),
            "decode, batch 32, from 64 tokens": _rate(engine, 32, 64, _NEW_TOKENS),
            "decode, batch 32, from 512 tokens": _rate(engine, 32, _PROMPT_TOKENS, _NEW_TOKENS),
        }
    finally:
        engine.shutdown()


def _rate(engine: Any, batch: int, prompt_tokens: int, new_tokens: int) -> float:
    """Tokens per second: of the prompt for one new token, else of decode past the first token."""
    ids = [[1000 + 7 * i + j for j in range(prompt_tokens)] for i in range(batch)]

    def seconds(count: int) -> float:
        start = time.perf_counter()
        engine.generate(
            input_ids=ids,
            sampling_params={"temperature": 0, "max_new_tokens": count, "ignore_eos": True},
        )
        return time.perf_counter() - start

    prefill = seconds(1)
    if new_tokens == 1:
        return batch * prompt_tokens / min(prefill, seconds(1))
    return batch * (new_tokens - 1) / (seconds(new_tokens) - min(prefill, seconds(1)))


if __name__ == "__main__":
    main()
