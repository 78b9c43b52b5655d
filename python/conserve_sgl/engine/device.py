"""What the scheduler has to know of the device that its model runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from conserve_sgl.emulation import Emulation
from conserve_sgl.engine.host import current_platform, get_device_name
from conserve_sgl.engine.step_meter import Mark
from conserve_sgl.machine import cpu_name

__all__ = ["device_name", "kv_token_bytes", "marks_of", "runs_behind"]


def runs_behind(device: str) -> bool:
    """Whether a launch on `device` returns before its work is done.

    It does not on a CPU, but for an emulated device, which is a CPU to SGLang and torch.
    """
    return device != "cpu" or _is_emulated()


def marks_of(scheduler: Any) -> Callable[[], Mark] | None:
    """What marks the ends of `scheduler`'s steps, or None where they do not overlap."""
    if not (scheduler.enable_overlap and runs_behind(scheduler.device)):
        return None
    event_class, stream = scheduler.device_module.Event, scheduler.forward_stream

    def mark() -> Mark:
        event = event_class(enable_timing=True)
        event.record(stream)
        return event

    return mark


def device_name(device: str, index: int) -> str:
    """What the step times of `device` depend on, for people and for a profile's identity."""
    if _is_emulated():
        return current_platform.get_device_name(index)
    if device != "cpu":
        return get_device_name(index) or device
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def kv_token_bytes(pool: Any) -> int:
    """Bytes of a token's KV in all layers of `pool`, a KVCache, or in those of the model whose
    device is emulated."""
    if _is_emulated():
        return current_platform.kv_token_bytes()
    sizes = pool.get_kv_size_bytes()  # of keys and of values, or of latents, which are both
    total = sum(sizes) if isinstance(sizes, tuple) else sizes
    return int(total) // (pool.size + pool.page_size)  # a page is padding


def _is_emulated() -> bool:
    return Emulation.from_environment() is not None
