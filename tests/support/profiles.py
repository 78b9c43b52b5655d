"""Profiles for tests that need no engine."""

from __future__ import annotations

from conserve_sgl.policy.latency import StepSample, StepWork
from conserve_sgl.profile import EngineIdentity

IDENTITY = EngineIdentity(
    model="some/Model-1B",
    config_sha256="ab" * 32,
    device="NVIDIA H100",
    dtype="bfloat16",
    kv_dtype="bfloat16",
    quantization=None,
    tp_size=1,
    attention_backend="fa3",
    graphs="prefill breakable, decode full",
    overlap=True,
    sglang="0.5.23",
)


def steps(slower: float = 1.0) -> list[StepSample]:
    """Prefills and decodes of a machine that does exactly what a latency model can say."""
    prefills = [StepWork.of([(n, c)]) for n in (16, 64, 256, 1024) for c in (0, 512)]
    decodes = [StepWork.of((), [c] * n) for n in (1, 2, 4, 8, 16, 32) for c in (200, 400)]
    return [
        *(StepSample(w, slower * (0.004 + 3e-5 * w.prefill_tokens)) for w in prefills),
        *(StepSample(w, slower * (0.005 + 2e-5 * w.decode_rows)) for w in decodes),
    ]
