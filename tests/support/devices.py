"""A small device whose true step times are a formula, as fixtures of whoever imports them."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from conserve_sgl.device.measured import with_steps
from conserve_sgl.device.table import Costs, Device
from conserve_sgl.policy import StepWork
from conserve_sgl.policy.latency import StepSample
from conserve_sgl.profile import Profile
from support.profiles import IDENTITY

COSTS = Costs(least_s=6e-3, token_s=2.5e-5, pair_s=4e-9, row_s=2e-5, context_s=5e-8)


def truth_s(work: StepWork) -> float:
    """A device that is not its costs: prompts grow dearer with their length, mixing is dear."""
    base_s = max(6.3e-3, 2.4e-5 * work.prefill_tokens * (1 + work.prefill_tokens / 40_000))
    rows_s = (2e-5 + (4e-4 if work.prefill_tokens else 0.0)) * work.decode_rows
    return base_s + 4e-9 * work.prefill_attention + rows_s + 5e-8 * work.decode_context


def grid() -> list[StepWork]:
    lengths = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    prefills = [StepWork.of([(n, c)]) for n in lengths for c in (0, 1024, 4096)]
    several = [StepWork.of([(n, 1024)] * k) for n in (128, 512) for k in (2, 4)]
    decodes = [
        StepWork.of((), [c] * n) for n in (1, 2, 4, 8, 16, 32, 64, 128) for c in (256, 1024, 4096)
    ]
    mixed = [
        StepWork.of([(n, 1024)], [1024] * rows)
        for n in lengths[::2]
        for rows in (1, 4, 16, 64, 128)
    ]
    return [*prefills, *several, *decodes, *mixed]


@pytest.fixture(scope="session")
def make_device() -> Callable[..., Device]:
    """A device of the grid's steps; fields of `Device` may be given."""

    def make(**fields) -> Device:
        some = {
            "name": "small",
            "gpu": "a GPU",
            "model": "a model",
            "backend": "one",
            "sglang": "0.5.23",
            "source": "a formula",
            "layers": 8,
            "costs": COSTS,
            "kv_bytes_per_token": 1e5,
            "copy_bytes_per_s": 2e10,
            "steps": (),
        }
        device = Device(**{**some, **fields})
        return with_steps(device, [StepSample(work, truth_s(work)) for work in grid()])

    return make


@pytest.fixture(scope="session")
def device(make_device) -> Device:
    return make_device()


LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Of an engine that is as the small device, whose model has a configuration."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(LLAMA))
    identity = msgspec.structs.replace(IDENTITY, model=str(model))
    samples = tuple(StepSample(work, truth_s(work)) for work in grid()[::2])
    now = datetime(2026, 11, 26, tzinfo=UTC)
    found = Profile(identity=identity, measured_at=now, layers=32, samples=samples)
    path = tmp_path / "profile.json"
    path.write_bytes(msgspec.json.encode(found))
    return path
