"""Adapters on a CPU: SGLang's plain operations, without the pinned memory that they ask for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

RANK, WIDTH = 2, 8


@pytest.fixture(scope="module")
def backend() -> Any:
    from sglang.srt.lora.backend.torch_backend import TorchNativeLoRABackend

    from conserve_sgl.platform import lora

    lora.install()
    lora.install()
    return TorchNativeLoRABackend(max_loras_per_batch=3, device=torch.device("cpu"))


def test_each_row_has_its_own_adapter_or_none(backend):
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    of_rows = [1, 0, 2, 1]  # 0 is the base model
    backend.prepare_lora_batch(
        SimpleNamespace(forward_mode=ForwardMode.DECODE, batch_size=len(of_rows)),
        of_rows,
        lora_ranks=[0, RANK, RANK],
        scalings=[0.0, 1.0, 0.5],
        use_cuda_graph=False,
    )
    x, a = torch.randn(len(of_rows), WIDTH), torch.randn(3, RANK, WIDTH)
    b = torch.randn(3, WIDTH, RANK)
    down = backend.run_lora_a_sgemm(x, a)
    added = backend.run_lora_b_sgemm(down, b, torch.tensor([0, WIDTH]))
    for row, adapter in enumerate(of_rows):
        scale = [0.0, 1.0, 0.5][adapter]
        assert torch.allclose(added[row], scale * b[adapter] @ (a[adapter] @ x[row]), atol=1e-5)


def test_layers_find_plain_memory(backend):  # noqa: ARG001  it installs
    from sglang.srt.lora import layers

    offsets = layers.torch.tensor([0, 4], dtype=torch.int32, pin_memory=True)
    assert offsets.tolist() == [0, 4]
    assert offsets.pin_memory() is offsets
    assert layers.torch.zeros(2, pin_memory=True).tolist() == [0.0, 0.0]
    assert layers.torch.nn is torch.nn
