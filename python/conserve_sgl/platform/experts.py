"""SGLang's experts on a CPU, without a compiler."""

from __future__ import annotations

import inspect

__all__ = ["install"]


def install() -> None:
    """Take the activation of gpt-oss's experts as it is written: SGLang compiles it, which takes
    a C++ compiler and half a minute. Idempotent."""
    from sglang.srt.layers.moe import fused_moe_native as native

    native.swiglu_gpt_oss_sigmoid_alpha = inspect.unwrap(native.swiglu_gpt_oss_sigmoid_alpha)
