"""What `conserve device` does: a server's own steps become a device to simulate on."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from conserve_sgl.device.measured import launch_times, with_steps
from conserve_sgl.device.table import Costs, Device, check_step
from conserve_sgl.errors import InputError
from conserve_sgl.policy.latency import LatencyModel, StepKind, StepSample
from conserve_sgl.profile.steps import read_steps
from conserve_sgl.profile.store import EngineIdentity, Profile, read_profile

__all__ = ["kv_bytes_per_token", "make_device", "write_device"]

_ANOTHER = 2.0
"""Times the profile's prediction, either way, from which steps are not of the profile's engine."""

_GRAPH_ROWS = (1, 2, 4, 8, 12, *range(16, 257, 8))
_GRAPH_TOKENS = 8192
_DECODE_LAUNCH_S = 0.002
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "fp8_e4m3": 1, "fp8_e5m2": 1}


def make_device(
    logs: Sequence[Path],
    profile: Path,
    *,
    name: str,
    kv_bytes: float | None = None,
    copy_bytes_per_s: float,
) -> Device:
    """The device of the engine that `profile` is of.

    Args:
        logs: its steps: `CONSERVE_STEP_LOG` of served requests, `CONSERVE_PROFILE_GRID`, or both.
        profile: says what was measured; its steps count too.
        name: of the device.
        kv_bytes: of a token in all layers; read from the model's configuration if not given.
        copy_bytes_per_s: between host and device memory.

    Raises:
        InputError: a file that cannot be used, a step that cannot be, or steps that are not of the
            profile's engine; names file and line.
    """
    found = read_profile(profile)
    samples = list(found.samples)
    for log in logs:
        samples += _steps_of(log, found)
    identity = found.identity
    on_gpu = not identity.device.endswith("threads")  # as `engine/device.py` names a CPU
    graphs = on_gpu and "disabled" not in identity.graphs
    device = Device(
        name=name,
        gpu=identity.device,
        model=f"{identity.model}, {identity.dtype}",
        backend=identity.attention_backend,
        sglang=identity.sglang,
        source=f"{len(samples)} steps of its own, profile of {found.measured_at:%Y-%m-%d}",
        layers=found.layers,
        costs=_rough(samples),
        kv_bytes_per_token=kv_bytes or kv_bytes_per_token(profile, identity, found.layers),
        copy_bytes_per_s=copy_bytes_per_s,
        decode_graph_rows=_GRAPH_ROWS if graphs else (),
        prefill_graph_tokens=_GRAPH_TOKENS if graphs else 0,
        synchronous=not on_gpu,
        # Without overlap the host's part is in every time, and nothing hides it.
        launch_s=launch_times(samples, _DECODE_LAUNCH_S)
        if on_gpu and identity.overlap
        else (0, 0, 0),
        steps=(),
    )
    return with_steps(device, samples)


def _steps_of(log: Path, profile: Profile) -> list[StepSample]:
    samples = read_steps(log)
    for line, sample in enumerate(samples, start=1):
        try:
            check_step(sample, "the step")
        except ValueError as e:
            raise InputError(log, str(e), line=line) from e
    model = LatencyModel(profile.samples, layers=profile.layers)
    off = median(s.seconds / max(model.predict_s(s.work), 1e-9) for s in samples)
    if not 1 / _ANOTHER < off < _ANOTHER:
        reason = (
            f"its steps take {off:.2g} times what the profile of {profile.identity.model} on "
            f"{profile.identity.device} says: they are of another engine"
        )
        raise InputError(log, reason)
    return samples


def _rough(samples: Sequence[StepSample]) -> Costs:
    """Where a kind of step is missing; what is there is fitted anew."""
    least_s = min(s.seconds for s in samples)
    prefills = [s for s in samples if s.work.kind is StepKind.PREFILL]
    per_token = [s.seconds / s.work.prefill_tokens for s in prefills]
    token_s = float(np.min(per_token)) if per_token else least_s
    return Costs(least_s=least_s, token_s=token_s, pair_s=0.0, row_s=0.0, context_s=0.0)


def kv_bytes_per_token(profile: Path, identity: EngineIdentity, layers: int) -> float:
    """Of all layers, by the model's configuration.

    Raises:
        InputError: it is not there, or says nothing of heads.
    """
    path = Path(identity.model) / "config.json"
    try:
        config = json.loads(path.read_bytes())
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads", heads)
    except (OSError, ValueError, KeyError, TypeError) as e:
        reason = f"of {identity.model}, and {path} says nothing of its heads: give --kv-bytes"
        raise InputError(profile, reason) from e
    return 2.0 * layers * kv_heads * size * _BYTES.get(identity.kv_dtype, 2)


def write_device(device: Device, path: Path) -> None:
    """Write `device`, all or nothing.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.encode(device) + b"\n")
        os.replace(temporary, path)
    except OSError as e:
        raise InputError(path, f"cannot be written: {e.strerror}") from e
