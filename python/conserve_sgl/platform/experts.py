"""SGLang's experts on a CPU, without a compiler."""

from __future__ import annotations

import inspect

import torch

__all__ = ["gate_shared", "install"]


def install() -> None:
    """Fill SGLang's seams in this process. Idempotent.

    The activation of gpt-oss's experts is taken as it is written: SGLang compiles it, which takes a
    C++ compiler and half a minute. What gates the shared expert of Qwen2-MoE, and of Qwen3-Next,
    has no other form than a kernel for GPUs.
    """
    from sglang.kernels.ops.elementwise import elementwise
    from sglang.srt.layers.moe import fused_moe_native as native

    native.swiglu_gpt_oss_sigmoid_alpha = inspect.unwrap(native.swiglu_gpt_oss_sigmoid_alpha)
    elementwise._launch_fused_gate_sigmoid_mul = gate_shared


def gate_shared(
    hidden_states: torch.Tensor,
    gate_weight: torch.Tensor,
    shared_output: torch.Tensor,
    output: torch.Tensor,
    *,
    do_add: bool,
) -> None:
    """Write what the shared expert gives of each token to `output`, or add it.

    Args:
        hidden_states, shared_output, output: [tokens, width]; the last is written.
        gate_weight: [width]; a token's share is the sigmoid of its product with it.
    """
    share = (hidden_states.float() @ gate_weight.float()).sigmoid()[:, None]
    gated = (share * shared_output.float()).to(output.dtype)
    torch.add(output, gated, out=output) if do_add else output.copy_(gated)
