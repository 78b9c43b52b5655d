"""The parts of a run on a GPU, in the order of worth: what each measures, runs and takes.

Times are those of one H100 with Llama-3.1-8B, seen in a first run or added up from what was seen;
a server takes 35 s to start where Python is quick and 60 s where it is not, 10 more with its first
latency profile and 10 with a host cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

__all__ = ["PARTS", "Part", "Setting", "part_named"]

LLAMA, QWEN = "llama8b", "qwen7b"
_GEOMETRY = {LLAMA: "llama-3.1-8b", QWEN: "qwen2.5-7b"}
_REHEARSED = 2  # of the systems of a part
_BENCH_RESERVE_S = 8.0  # a benchmark ends so long before its part is cut off

Argv = list[str]
LeftS = Callable[[], float]


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What parts need to know of this run.

    Args:
        results: folder of everything that is measured.
        flags: of every server, but for its attention backend and its model.
        rehearse: on a CPU with a tiny model, for seconds.
        flashinfer: a folder for PYTHONPATH that makes FlashInfer importable; None without.
        chosen_backend: of attention; None leaves it to the part `check`.
    """

    results: Path
    flags: tuple[str, ...] = ()
    rehearse: bool = False
    flashinfer: Path | None = None
    chosen_backend: str | None = None

    @property
    def machine(self) -> Path:
        """The folder of what is known of the machine: backend, profiles, logs."""
        return self.results / "machine"

    @property
    def costs(self) -> Path:
        """The folder of measurements that are no benchmark."""
        return self.results / "costs"

    @property
    def backend(self) -> str:
        """The attention backend that was chosen, by hand or by the part `check`; without either,
        the one that held first."""
        if self.chosen_backend:
            return self.chosen_backend
        try:
            return json.loads((self.machine / "backend.json").read_bytes())["use"]
        except (OSError, ValueError, KeyError):
            return "default" if self.rehearse else "triton"

    def keep_backend(self) -> None:
        """Note a backend that was chosen by hand, for a later run that goes on from here."""
        path = self.machine / "backend.json"
        if self.chosen_backend and not path.exists():
            path.write_text(json.dumps({"use": self.chosen_backend}), "utf-8")

    def model(self, name: str) -> str:
        """The folder of a geometry."""
        return f".cache/models/{self._geometry(name)}-dummy"

    def write_model(self, name: str) -> Argv:
        """What writes it."""
        return ["scripts/dummy_model.py", self._geometry(name), self.model(name)]

    def _geometry(self, name: str) -> str:
        return "tiny" if self.rehearse else _GEOMETRY[name]

    def server_flags(self, backend: str) -> Argv:
        """Flags of a server with made-up weights."""
        small = ["--max-total-tokens=32768"] if self.rehearse else []
        made_up = ["--load-format=dummy", "--skip-tokenizer-init"]
        return [*made_up, *small, *_on(backend), *self.flags]


def _on(backend: str) -> Argv:
    return [] if backend == "default" else [f"--attention-backend={backend}"]


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One thing to measure.

    Args:
        name: as on the command line.
        about: a line on what it measures.
        least_s: it is not begun with less time.
        wants_s: what it takes as a whole.
        commands: what it runs, of `python3`; each is asked for when the one before it has ended,
            with the seconds that are left.
        obstacle: why it cannot or need not run here, or None.
        env: of its commands.
    """

    name: str
    about: str
    least_s: float
    wants_s: float
    commands: Callable[[Setting, LeftS], Iterator[Argv]]
    obstacle: Callable[[Setting], str | None] = lambda _: None
    env: Callable[[Setting], dict[str, str]] = lambda _: {}

    @property
    def limit_s(self) -> float:
        """When it is cut off: half as much again as it should take, so that a part that hangs
        does not take the time of all others."""
        return 1.5 * self.wants_s + 20


# ------------------------------------------------------------------------ commands


def _check(setting: Setting, left_s: LeftS) -> Iterator[Argv]:
    size = ["--layers=8", "--hidden=1024"]
    backends = ["--reference=triton", "--candidate=fa3"]
    if setting.rehearse:
        size = ["--layers=2", "--hidden=512", "--prompts=6"]
        backends = ["--reference=default", "--candidate=default"]
    yield [
        *("-m", "conserve_sgl.bench.micro.backends", *backends, *size),
        *(f"--ready-s={max(left_s() - 15, 10):.0f}", f"--out={setting.machine}"),
        *("--", *setting.flags),
    ]


def _bench(*systems: str, model: str = LLAMA, backend: str | None = None, repeats: int = 1):
    """A benchmark of some systems, in the folder of its model and backend."""

    def commands(setting: Setting, left_s: LeftS) -> Iterator[Argv]:
        on = backend or setting.backend
        named = systems[:_REHEARSED] if setting.rehearse else systems
        yield setting.write_model(model)
        yield [
            *("-m", "conserve_sgl.cli", "bench", f"configs/bench/h100-{model}.yaml"),
            *("--systems", ",".join(named), "--repeats", str(repeats)),
            *(["--duration", "3"] if setting.rehearse else []),
            *("--model", setting.model(model), "--out", str(setting.results / f"{model}-{on}")),
            *("--no-pictures", "--time-limit", f"{max(left_s() - _BENCH_RESERVE_S, 0):.0f}"),
            *("--", *setting.server_flags(on)),
        ]

    return commands


def _module(
    name: str,
    out: str,
    *options: str,
    rehearsed: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
):
    """A measurement with a server of its own, by a module of `conserve_sgl.bench.micro`."""

    def commands(setting: Setting, _: LeftS) -> Iterator[Argv]:
        yield setting.write_model(LLAMA)
        yield [
            *("-m", f"conserve_sgl.bench.micro.{name}", "--model", setting.model(LLAMA)),
            *(rehearsed if setting.rehearse else options),
            *("--out", str(setting.costs / out)),
            *("--", *([] if setting.rehearse else flags)),
            *setting.server_flags(setting.backend),
        ]

    return commands


def _tests(_setting: Setting, _left_s: LeftS) -> Iterator[Argv]:
    yield [
        *("-m", "pytest", "-m", "engine", "-q", "-p", "no:cacheprovider", "--timeout", "300"),
        *("--durations", "10", "tests/engine/test_checkpoint.py", "tests/engine/test_slices.py"),
        *("tests/engine/test_coserving.py", "tests/engine/test_random_traffic.py"),
    ]


def _is_chosen(setting: Setting) -> str | None:
    return "the backend was chosen by hand" if setting.chosen_backend else None


def _main_is_triton(setting: Setting) -> str | None:
    return None if setting.backend != "triton" else "the main rows are Triton's"


def _no_flashinfer(setting: Setting) -> str | None:
    return None if setting.flashinfer else "FlashInfer is not here"


def _with_flashinfer(setting: Setting) -> dict[str, str]:
    paths = [str(setting.flashinfer), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


PARTS: tuple[Part, ...] = (
    Part(
        name="check",
        about="whether FlashAttention-3 answers as Triton does; the backend of all that follows",
        least_s=40,
        wants_s=60,
        commands=_check,
        obstacle=_is_chosen,
    ),
    Part(
        name="stock",
        about="online-only, offline-only, stock-priority, on one server",
        least_s=110,
        wants_s=230,
        commands=_bench("online-only", "offline-only", "stock-priority"),
    ),
    Part(
        name="conserve",
        about="conserve at 500 / 25 ms, its dial, and without offline work, on one server",
        least_s=130,
        wants_s=340,
        commands=_bench(
            *("conserve", "conserve-50ms", "conserve-1.25x", "conserve-15ms", "conserve-2x"),
            *("conserve-online-only",),
        ),
    ),
    Part(
        name="yields",
        about="how long online arrivals wait for a slice; sliced against plain prefills",
        least_s=60,
        wants_s=75,
        commands=_module(
            "slice_cost",
            "yields",
            *("--lengths", "512", "2048", "8192"),
            rehearsed=("--lengths", "256", "1024", "--arrivals", "3"),
            flags=("--max-running-requests=16",),
        ),
    ),
    Part(
        name="resume",
        about="resuming a context from the host against computing it again, 1K to 16K",
        least_s=60,
        wants_s=75,
        commands=_module(
            "resume",
            "resume",
            *("--contexts", "1024", "4096", "8192", "16384"),
            rehearsed=("--contexts", "256", "1024"),
            flags=("--max-running-requests=16", "--chunked-prefill-size=4096"),
        ),
    ),
    Part(
        name="again",
        about="online-only once more: with `stock` before it, conserve without offline work is "
        "measured between the two",
        least_s=110,
        wants_s=110,
        commands=_bench("online-only", repeats=2),
    ),
    Part(
        name="grid",
        about="mixed, graph and eager steps over a grid of rows and tokens: a simulated device",
        least_s=100,
        wants_s=150,
        commands=_module(
            "step_grid",
            "grid",
            flags=(
                *("--mem-fraction-static=0.85", "--max-running-requests=256"),
                "--chunked-prefill-size=4096",
            ),
        ),
    ),
    Part(
        name="variants",
        about="stock SGLang with mixed chunks, a small token budget, decode steps between prefills",
        least_s=120,
        wants_s=350,
        commands=_bench("stock-priority-mixed", "stock-priority-budget", "stock-priority-interval"),
    ),
    Part(
        name="triton",
        about="the main rows with the other attention backend",
        least_s=140,
        wants_s=280,
        commands=_bench("conserve", "online-only", "offline-only", backend="triton"),
        obstacle=_main_is_triton,
    ),
    Part(
        name="overlap",
        about="a trace: copies and slices beside the steps of the model",
        least_s=70,
        wants_s=90,
        commands=_module(
            "overlap", "overlap", "--activities", "GPU", rehearsed=("--activities", "CPU")
        ),
    ),
    Part(
        name="tests",
        about="the engine tests that a GPU changes",
        least_s=150,
        wants_s=300,
        commands=_tests,
    ),
    Part(
        name="unsliced",
        about="arrivals that meet offline prefills without layer slices",
        least_s=60,
        wants_s=70,
        commands=_module(
            "slice_cost",
            "unsliced",
            *("--lengths", "8192", "--unsliced"),
            rehearsed=("--lengths", "1024", "--arrivals", "3", "--unsliced"),
            flags=("--max-running-requests=16",),
        ),
    ),
    Part(
        name="flashinfer",
        about="the main rows with FlashInfer, whose kernels compile for minutes",
        least_s=240,
        wants_s=400,
        commands=_bench("conserve", "online-only", "offline-only", backend="flashinfer"),
        obstacle=_no_flashinfer,
        env=_with_flashinfer,
    ),
    Part(
        name="qwen",
        about="the main rows on Qwen2.5-7B",
        least_s=240,
        wants_s=400,
        commands=_bench(*("online-only", "offline-only", "stock-priority", "conserve"), model=QWEN),
    ),
)
"""All parts, in the order of worth."""


def part_named(name: str) -> Part:
    """The part of that name.

    Raises:
        KeyError: there is none.
    """
    return {part.name: part for part in PARTS}[name]
