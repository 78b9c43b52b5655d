"""What the emulated model makes of SGLang's batches."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from conserve_sgl.errors import IncompatibleError
from conserve_sgl.platform.emulated import model
from conserve_sgl.platform.emulated.model import EmulatedForCausalLM, work_of
from conserve_sgl.policy.latency import StepWork


def batch(mode: ForwardMode, **fields) -> SimpleNamespace:
    return SimpleNamespace(forward_mode=mode, **fields)


def extend(mode: ForwardMode, spans: list[tuple[int, int]]) -> SimpleNamespace:
    new, resident = zip(*spans, strict=True)
    return batch(mode, extend_seq_lens_cpu=list(new), extend_prefix_lens_cpu=list(resident))


@pytest.mark.parametrize(
    ("forward_batch", "work"),
    [
        (
            batch(ForwardMode.DECODE, seq_lens_cpu=torch.tensor([10, 300])),
            StepWork(decode_rows=2, decode_context=310),
        ),
        (extend(ForwardMode.EXTEND, [(100, 0), (1, 7)]), StepWork.of([(100, 0), (1, 7)])),
        (extend(ForwardMode.SPLIT_PREFILL, [(64, 32)]), StepWork.of([(64, 32)])),
        (
            extend(ForwardMode.MIXED, [(100, 20), (1, 9), (1, 40)]),
            StepWork.of([(100, 20)], [10, 41]),
        ),
    ],
    ids=["decode", "extend", "split", "mixed"],
)
def test_the_work_of_a_batch(forward_batch: SimpleNamespace, work: StepWork) -> None:
    assert work_of(forward_batch) == work


@pytest.mark.parametrize(("rows", "repeated"), [(1, 0), (2, 0), (3, 128), (4, 128 + 64)])
def test_kv_that_rows_share_is_read_again_by_all_but_one(
    monkeypatch: pytest.MonkeyPatch, rows: int, repeated: int
) -> None:
    slots = torch.arange(4 * 1000).reshape(4, 1000)
    slots[1, :128] = slots[3, :128]  # of the last three rows, two share 128 tokens
    slots[0, :64] = slots[2, :64]
    pool = SimpleNamespace(req_to_token=slots)
    monkeypatch.setattr(model, "get_req_to_token_pool", lambda: pool)
    forward_batch = SimpleNamespace(
        seq_lens_cpu=torch.tensor([100, 300, 200, 130]), req_pool_indices=torch.arange(4)
    )

    assert model._repeated_context(forward_batch, rows) == repeated


def test_a_device_measured_with_another_depth_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name="gpu (emulated)", spec=SimpleNamespace(layers=32))
    monkeypatch.setattr(model, "the_device", lambda: device)
    config = SimpleNamespace(num_hidden_layers=4, eos_token_id=[2, 3], vocab_size=10)
    with pytest.raises(IncompatibleError, match=r"32 layers, and this one has 4"):
        EmulatedForCausalLM(config)
    config.num_hidden_layers = 32

    spoken = EmulatedForCausalLM(config)._spoken

    assert spoken.tolist() == [0, 1, 4, 5, 6, 7, 8, 9]
