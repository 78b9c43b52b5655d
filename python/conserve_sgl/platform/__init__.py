"""SGLang on a plain CPU, as an out-of-tree platform of SGLang.

activate   the entry point: says whether this platform serves
cpu        CpuPlatform, the platform: identity, server defaults, start-up of a worker
attention  CpuAttnBackend, its attention backend
hicache    HiCache's host pool where device and host are the same memory
emulated/  another device: this platform, but for a forward pass that is only time
compare    `python -m conserve_sgl.platform.compare`: attention timed against torch_native

Importing this package imports neither torch nor sglang.
"""

from __future__ import annotations

import os

from conserve_sgl.emulation import DEVICE_ENV, Emulation
from conserve_sgl.errors import IncompatibleError

__all__ = ["NAME", "SPIN_COUNT", "activate"]

NAME = "conserve_cpu"
"""The platform's entry point, and the name of its attention backend."""

SPIN_COUNT = "20000"
"""Default of `GOMP_SPINCOUNT`: how often an idle OpenMP thread looks before it sleeps."""

_PLATFORM_CLASS = "conserve_sgl.platform.cpu:CpuPlatform"
_EMULATED = "conserve_sgl.platform.emulated"
_EMULATED_CLASS = f"{_EMULATED}.platform:EmulatedPlatform"


def activate() -> str | None:
    """Entry point of `sglang.srt.platforms`: the platform's class, or None to stay out of the way.

    Chosen by `SGLANG_PLATFORM=conserve_cpu`, or, unless another platform is named there, by
    `CONSERVE_CONFIG` on a machine where torch sees no accelerator. A stock server is never touched.
    `CONSERVE_EMULATED_DEVICE` chooses, for a stock server too, the emulated device of that name.
    When chosen, sets `GOMP_SPINCOUNT` unless it is set: the scheduler's process, which is spawned
    later, inherits it.

    Raises:
        IncompatibleError: named explicitly although torch sees an accelerator.
    """
    emulation = Emulation.from_environment()
    if not _chosen(emulating=emulation is not None):
        return None
    # An OpenMP thread that spins at a barrier takes its core from the tokenizer, the detokenizer
    # and the client; one that sleeps at once pays a wake-up in every operator. Tens of
    # microseconds bridge the gap between two operators (docs/cpu-platform.md has the figures).
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    if emulation is None:
        return _PLATFORM_CLASS
    os.environ["SGLANG_EXTERNAL_MODEL_PACKAGE"] = _EMULATED
    return _EMULATED_CLASS


def _chosen(*, emulating: bool) -> bool:
    named = os.environ.get("SGLANG_PLATFORM")
    if named == NAME or (emulating and not named):
        _refuse_accelerator()
        return True
    return not named and bool(os.environ.get("CONSERVE_CONFIG")) and not _accelerator()


def _refuse_accelerator() -> None:
    # SGLang's modules pick CUDA code at import from torch alone, whatever the platform says.
    if device := _accelerator():
        raise IncompatibleError(
            f"SGLANG_PLATFORM={NAME} and {DEVICE_ENV} serve on the CPU, but torch sees "
            f"{device}: hide it (CUDA_VISIBLE_DEVICES= for CUDA), or unset them"
        )


def _accelerator() -> str | None:
    """The accelerator that torch can use (`cuda`, `xpu`, `npu`, `mps`, ...), or None."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    return device.type if device is not None else None
