"""Adapters (LoRA) on a platform without an accelerator.

SGLang's backend `torch_native` computes them in plain tensor operations, but puts its indices into
pinned memory, of which there is none without a driver to pin it. Here it gets plain memory.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["install"]


class _TorchWithoutPins:
    """`torch`, in whose place it stands in a module, with `pin_memory` left out of account."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:  # noqa: ARG004
        return torch.tensor(*args, **kwargs)

    @staticmethod
    def zeros(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:  # noqa: ARG004
        return torch.zeros(*args, **kwargs)


def install() -> None:
    """Fill SGLang's seams in this process. Idempotent; call before adapters are loaded."""
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend

    layers.torch = torch_backend.torch = _TorchWithoutPins()
    torch.Tensor.pin_memory = lambda tensor, *_args: tensor  # nothing else could it do here
