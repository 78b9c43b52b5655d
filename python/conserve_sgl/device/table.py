"""A device: what a step truly takes on it, in the simulator and on the emulated device.

A device is a table of measured steps. The time of a step that was not measured is interpolated
between its neighbours in the table, of the same regime:

    decode     in a CUDA graph, padded to the graph's rows, or eager beyond the largest graph
    prefill    in a CUDA graph, or eager; always eager in layer slices, layer by layer
    mixed      prompts and decode rows in one step

What is interpolated is a step's time over `Costs`, a formula that is right to a tenth or so and
stands by itself where nothing was measured: the mean of the logarithms of the nearest measured
steps, nearer ones weighing more. Beyond the edge of the table its edge is kept. This is not the
policy's own model of step times (`policy.latency`), which is what the simulator is there to try.

The host needs its own time to launch a step, `launch_s`, beside the step before it. The table holds
the device's part.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from importlib import resources
from math import inf
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from conserve_sgl.errors import InputError
from conserve_sgl.policy.latency import StepKind, StepSample, StepWork

__all__ = ["FORMAT", "Costs", "Device", "StepTimes", "load_device", "place", "shipped_devices"]

FORMAT = 1

_NEIGHBOURS = 8
_NEAREST = 0.05
"""Distance, in doublings, below which neighbours are equally near: a table has noise of its own."""

Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Graphs = tuple[Count, ...]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class Costs(_Record, kw_only=True):
    """Roughly what a step takes: a roofline from the hardware's data sheet, or fitted to steps.

    Args:
        least_s: reading all weights once: no step takes less.
        token_s: computing a prompt token, beyond what reading the weights hides.
        pair_s: attention of a prompt token to one other.
        row_s: a decode row.
        context_s: reading a token's KV for a decode row.
        mixed_row_s: a decode row that runs beside a prompt, on top.
    """

    least_s: Positive
    token_s: Positive
    pair_s: NotNegative
    row_s: NotNegative
    context_s: NotNegative
    mixed_row_s: NotNegative = 0.0

    def seconds(self, work: StepWork) -> float:
        """Weights or the prompt tokens, whichever is longer; attention and rows on top."""
        rows_s = self.row_s * work.decode_rows + self.context_s * work.decode_context
        if work.prefill_tokens:
            rows_s += self.mixed_row_s * work.decode_rows
        compute_s = max(self.token_s * work.prefill_tokens, self.least_s)
        return compute_s + self.pair_s * work.prefill_attention + rows_s


class Device(_Record, kw_only=True):
    """A device file: one model on one GPU with one attention backend.

    Args:
        name: what it is called on the command line.
        gpu, model, backend, sglang: what was measured.
        source: how, in a sentence.
        layers: decoder layers of the model.
        costs: see there.
        kv_bytes_per_token: of all layers.
        copy_bytes_per_s: between host and device memory, one way.
        copy_holds_s: what the step after a copy to the host is held up by each token of it. Of the
            emulated device only.
        decode_graph_rows: rows of the captured decode graphs, rising; a batch is padded to the
            next of them, and one beyond the last runs eagerly. Empty: no graphs.
        prefill_graph_tokens: the largest prefill that runs in a graph; 0: none does.
        synchronous: a CPU: the host runs every step itself, and does nothing else meanwhile.
        launch_s: of each kind of step (prefill, decode, mixed) what launching it takes the host.
        eager_layer_s: what launching one layer takes the host outside of a graph: a sliced prefill
            takes no less.
        repeated_read: what a row's reading of KV costs that another row of the step reads as well,
            a shared prefix, over that of KV which no other reads: the second finds it in a cache.
        steps: the table, of rows that share nothing. Several measurements of one shape are one
            step, their median.
        noise: of each kind of step measured times over the table's, as evenly spaced quantiles
            from the least to the greatest; none: no noise.
    """

    format: int = FORMAT
    name: str
    gpu: str
    model: str
    backend: str
    sglang: str
    source: str
    layers: Count
    costs: Costs
    kv_bytes_per_token: Positive
    copy_bytes_per_s: Positive
    copy_holds_s: NotNegative = 0.0
    decode_graph_rows: Graphs = ()
    prefill_graph_tokens: Natural = 0
    synchronous: bool = False
    launch_s: tuple[NotNegative, NotNegative, NotNegative] = (0.0, 0.0, 0.0)
    eager_layer_s: NotNegative = 0.0
    repeated_read: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    steps: tuple[StepSample, ...]
    noise: tuple[tuple[Positive, ...], ...] = ((), (), ())

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"a device of format {self.format}, not {FORMAT}")
        if list(self.decode_graph_rows) != sorted(set(self.decode_graph_rows)):
            raise ValueError("decode_graph_rows do not rise")
        if len(self.noise) != len(StepKind):
            raise ValueError("noise: needs a list each for prefill, decode and mixed steps")
        for i, step in enumerate(self.steps):
            check_step(step, f"steps[{i}]")

    def padded(self, work: StepWork) -> StepWork:
        """`work` with the rows of the graph in which it runs, if it is a decode step in one."""
        rows, graphs = work.decode_rows, self.decode_graph_rows
        if work.prefill_tokens or not graphs or rows > graphs[-1]:
            return work
        slot = graphs[bisect.bisect_left(graphs, rows)]
        return work if slot == rows else msgspec.structs.replace(work, decode_rows=slot)

    def regime(self, work: StepWork) -> tuple[StepKind, bool]:
        """The kind of a step, and whether it runs in a graph."""
        if work.kind is StepKind.DECODE:
            graphs = self.decode_graph_rows
            return StepKind.DECODE, bool(graphs) and work.decode_rows <= graphs[-1]
        in_graph = work.prefill_tokens + work.decode_rows <= self.prefill_graph_tokens
        return work.kind, in_graph

    def copy_s(self, tokens: int) -> float:
        """Seconds to copy the KV of so many tokens between host and device."""
        return tokens * self.kv_bytes_per_token / self.copy_bytes_per_s


def check_step(step: StepSample, key: str) -> None:
    """
    Raises:
        ValueError: `step` cannot have been measured; names `key` and the field.
    """
    work = step.work
    if not 0 < step.seconds < inf:
        raise ValueError(f"{key}: a step takes a time above 0, not {step.seconds} s")
    for field, value in msgspec.structs.asdict(work).items():
        if not 0 <= value < inf:
            raise ValueError(f"{key}: {field} is {value}")
    if not (work.prefill_tokens or work.decode_rows):
        raise ValueError(f"{key}: a step of nothing")
    if bool(work.prefill_tokens) != bool(work.prompts):
        raise ValueError(f"{key}: prompt tokens and prompts go together")


def load_device(name: str | Path) -> Device:
    """The device of that name among those that are shipped, or the file at that path.

    Raises:
        InputError: there is none, or it is no device; names the key.
    """
    shipped = shipped_devices()
    if str(name) in shipped:
        return read_device(shipped[str(name)])
    path = Path(name)
    if path.suffix != ".json" and not path.exists():
        reason = f"is no device; there are {', '.join(shipped)}, or give a .json file"
        raise InputError(path, reason)
    return read_device(path)


def read_device(path: Path) -> Device:
    """The device in the file at `path`.

    Raises:
        InputError: unreadable, or no device; names the key.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Device)
    except OSError as e:
        raise InputError(path, f"cannot be read: {e.strerror}") from e
    except ValueError as e:  # msgspec's are ValueErrors too
        raise InputError(path, f"not a device of this version: {e}") from e


def shipped_devices() -> dict[str, Path]:
    """By name; files of this package."""
    folder = Path(str(resources.files("conserve_sgl.device") / "shipped"))
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


class StepTimes:
    """Step times of a device.

    Args:
        device: the device.
        seed: of the noise; None: no noise.
    """

    def __init__(self, device: Device, seed: int | None = None) -> None:
        self.device = device
        self._random = None if seed is None else random.Random(seed)
        regimes: dict[tuple[StepKind, bool], list[StepSample]] = {}
        for step in device.steps:
            work = device.padded(step.work)
            regimes.setdefault(device.regime(work), []).append(StepSample(work, step.seconds))
        self._tables = {key: _Table(device.costs, some) for key, some in regimes.items()}

    def mean_s(self, work: StepWork) -> float:
        """Seconds of a step of `work`, without noise; 0 of nothing."""
        if not (work.prefill_tokens or work.decode_rows):
            return 0.0
        work = self.device.padded(work)
        table = self._tables.get(self.device.regime(work))
        rough_s = self.device.costs.seconds(work)
        return rough_s if table is None else rough_s * table.over_costs(work)

    def draw_s(self, work: StepWork, repeated_context: int = 0) -> float:
        """Seconds that one such step takes, with noise; `repeated_context` tokens of its rows'
        contexts are of blocks that another row has read."""
        if repeated_context:
            saved = round((1 - self.device.repeated_read) * repeated_context)
            work = msgspec.structs.replace(work, decode_context=work.decode_context - saved)
        return self.mean_s(work) * self._noise(work)

    def launch_s(self, work: StepWork) -> float:
        """Seconds that launching a step takes the host."""
        return self.device.launch_s[work.kind]

    def held_s(self, work: StepWork, seconds: float) -> float:
        """How long the host is held by a step that takes the device `seconds`."""
        return seconds if self.device.synchronous else self.launch_s(work)

    def measure_s(self, work: StepWork) -> float:
        """Seconds that one such step takes among its like: the device's or the host's, whichever
        is longer."""
        return max(self.draw_s(work), self.launch_s(work))

    def draw_layer_s(self, work: StepWork) -> float:
        """Seconds of one layer of a prefill that runs in layer slices, with noise."""
        layer_s = self.mean_s(work) / self.device.layers
        layer_s = max(layer_s, self.device.eager_layer_s)
        return layer_s * self._noise(work)

    def _noise(self, work: StepWork) -> float:
        of_kind = self.device.noise[work.kind]
        if self._random is None or not of_kind:
            return 1.0
        place = self._random.random() * (len(of_kind) - 1)
        low = int(place)
        high = min(low + 1, len(of_kind) - 1)
        return of_kind[low] + (place - low) * (of_kind[high] - of_kind[low])


class _Table:
    """Measured steps of one regime."""

    def __init__(self, costs: Costs, steps: Sequence[StepSample]) -> None:
        points = np.array([place(step.work) for step in steps])
        ratios = [step.seconds / costs.seconds(step.work) for step in steps]
        self._heights = np.log(ratios)
        self._low, self._high = points.min(axis=0), points.max(axis=0)
        self._spread = np.flatnonzero(self._high > self._low)
        self._points = points[:, self._spread]

    def over_costs(self, work: StepWork) -> float:
        """The time of `work` over its costs."""
        at = np.clip(place(work), self._low, self._high)[self._spread]
        offsets = self._points - at
        squares = np.einsum("ij,ij->i", offsets, offsets)
        heights = self._heights
        if len(squares) > _NEIGHBOURS:
            near = np.argpartition(squares, _NEIGHBOURS)[:_NEIGHBOURS]
            squares, heights = squares[near], heights[near]
        weights = (squares + _NEAREST**2) ** -1.5
        return float(np.exp(weights @ heights / weights.sum()))


def place(work: StepWork) -> np.ndarray:
    """Where a step lies, in doublings: tokens, tokens each of them sees, prompts, rows, context."""
    seen = work.prefill_attention / work.prefill_tokens if work.prefill_tokens else 0.0
    context = work.decode_context / work.decode_rows if work.decode_rows else 0.0
    parts = (
        1.0 + work.prefill_tokens,
        64.0 + seen,
        1.0 + work.prompts,
        0.5 + work.decode_rows,
        256.0 + context,
    )
    return np.log2(parts)
