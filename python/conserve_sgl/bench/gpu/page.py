"""A run on a GPU as a page: what was measured, on what, and the picture, with nothing retyped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from conserve_sgl.bench.gpu.parts import PARTS, Setting
from conserve_sgl.bench.gpu.state import States
from conserve_sgl.bench.gpu.summary import bench_table
from conserve_sgl.bench.report.environment import Environment
from conserve_sgl.bench.report.results import Result, SystemResult, by_system, read_folder
from conserve_sgl.errors import InputError

__all__ = ["first_seconds", "page", "write_page"]

FIRST_RUN_S = 45.0
"""The window of the first run on a GPU, whose load this one continues."""

_COLORS = {"conserve": "#08519c", "stock": "#d95f02"}
_MARKERS = "oDv^s"


def write_page(results: Path, to: Path) -> None:
    """Write the page of `results` to `to`, and its picture beside it, as NAME.png.

    Raises:
        InputError: there is no finished run in `results`.
    """
    benches = _benches(results)
    picture = to.with_suffix(".png")
    has_picture = _draw(benches, picture)
    to.write_text(page(results, picture.name if has_picture else None), "utf-8")


def page(results: Path, picture: str | None = None) -> str:
    """The page in Markdown.

    Raises:
        InputError: there is no finished run in `results`.
    """
    setting = Setting(results=results)
    benches = _benches(results)
    runs = [result.run for systems in benches.values() for s in systems for result in s.results]
    began = datetime.fromtimestamp(min(run.started_unix_s for run in runs), UTC)
    on = runs[0].environment
    sections = [
        f"# {on.gpus[0] if on.gpus else on.cpu}, {began:%Y-%m-%d}\n",
        "Written by `conserve bench --page` from the results of `scripts/gpu/run.sh`: change that, "
        "not this.\n",
        _conditions(on, sorted({run.clocks for run in runs if run.clocks})),
        f"![offline share over ITL P99]({picture})\n" if picture else "",
        *(_bench(name, systems) for name, systems in benches.items()),
        *_costs(setting),
        _parts(setting),
    ]
    return "\n".join(section for section in sections if section)


def _benches(results: Path) -> dict[str, list[SystemResult]]:
    """Every benchmark in a folder of results, by its name: model and attention backend."""
    found = {}
    for folder in sorted(path for path in results.glob("*-*") if (path / "runs").is_dir()):
        try:
            found[folder.name] = _in_order(by_system(read_folder(folder)))
        except InputError:  # nothing in it was finished
            continue
    if not found:
        raise InputError(results, "holds no finished run of scripts/gpu/run.sh")
    return found


def _in_order(systems: list[SystemResult]) -> list[SystemResult]:
    """The baselines first; else as they were measured."""
    return sorted(systems, key=lambda s: s.system.kind == "conserve")


def _conditions(on: Environment, clocks: Sequence[str]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in on.versions.items())
    text = f"{on.hardware}; {on.system}; Python {on.python}; {versions}; commit {on.commit}.\n"
    if on.driver:
        text += f"Driver, greatest clocks, power limit, memory: {on.driver}.\n"
    if clocks:
        text += f"SM and memory clock, power, temperature as windows ended: {'; '.join(clocks)}.\n"
    return text


def _bench(name: str, systems: list[SystemResult]) -> str:
    run = systems[0].results[0].run
    model, _, backend = name.rpartition("-")
    text = (
        f"## {model}, attention {backend}\n\n"
        f"{Path(run.model).name}; TTFT {run.slo.ttft_ms:g} ms and TPOT {run.slo.tpot_ms:g} ms "
        f"(where a system's name has a time, that one); seed {run.seed}; SGLang flags of the first "
        f"server: `{_flags(run.server_command)}`\n\n"
        f"{bench_table(systems)}"
    )
    short = [s for s in systems if s.results[0].run.window_s > FIRST_RUN_S]
    if short:
        cut = [SystemResult([first_seconds(r, FIRST_RUN_S) for r in s.results]) for s in short]
        text += (
            f"\nThe first {FIRST_RUN_S:g} s of the same runs, which are the load of the first run "
            f"on an H100:\n\n{bench_table(cut)}"
        )
    return text


def _flags(command: Sequence[str]) -> str:
    """Without the interpreter, the model and the port, which say nothing."""
    named = command[command.index("serve") + 1 :] if "serve" in command else command
    flags, skip = [], False
    for word in named:
        if skip:
            skip = False
        elif word in ("--model-path", "--host", "--port"):
            skip = True
        else:
            flags.append(word)
    return " ".join(flags)


def first_seconds(result: Result, seconds: float) -> Result:
    """A run as if its window had been `seconds` long: the requests due in it, and its work."""
    records = [r for r in result.records if r.class_ == "offline" or r.due_s < seconds]
    run = msgspec.structs.replace(result.run, window_s=seconds, duration_s=seconds, idle_share=None)
    return Result(run, tuple(records))


def _costs(setting: Setting) -> list[str]:
    about = {part.name: part.about for part in PARTS}
    return [
        f"## {path.parent.name}: {about.get(path.parent.name, path.stem)}\n\n"
        f"{path.read_text('utf-8')}"
        for path in sorted(setting.costs.glob("*/*.md"))
    ]


def _parts(setting: Setting) -> str:
    states = States(setting.machine / "parts.json").by_part
    lines = [
        f"| {part.name} | {part.about} | "
        f"{states[part.name].text if part.name in states else 'not run'} | "
        f"{f'{states[part.name].seconds:.0f} s' if part.name in states else '-'} |\n"
        for part in PARTS
    ]
    header = "| part | what | state | took |\n|---|---|---|---:|\n"
    return f"## What was run\n\n{header}{''.join(lines)}"


# ------------------------------------------------------------------------- picture


def _draw(benches: Mapping[str, Sequence[SystemResult]], path: Path) -> bool:
    """Offline work, as a share of what the GPU does with nothing else, over ITL P99: a curve for
    each dial, a point for each other system; False where nothing was measured beside a ceiling."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5), dpi=130, layout="constrained")
    axis = figure.subplots()
    drawn = [
        _draw_bench(axis, name, systems, marker)
        for (name, systems), marker in zip(benches.items(), _MARKERS, strict=False)
    ]
    if not any(drawn):
        return False
    axis.set(
        xscale="log",
        xlabel="ITL P99 of online requests (ms)",
        ylabel="offline tokens/s, % of offline-only",
    )
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.suptitle("Up and left is better", fontsize=11, x=0.01, ha="left")
    figure.savefig(path)
    return True


def _draw_bench(axis, name: str, systems: Sequence[SystemResult], marker: str) -> bool:
    alone = next((s.offline for s in systems if s.system.is_offline_ceiling), None)
    points = [
        (system, system.online.itl_ms.p99, 100 * system.offline.total_tokens_per_s)
        for system in systems
        if system.system.load == "both" and system.online.completed and system.offline
    ]
    if alone is None or not alone.total_tokens_per_s or not points:
        return False
    points = [(system, itl, tokens / alone.total_tokens_per_s) for system, itl, tokens in points]
    turned = sorted((itl, share) for system, itl, share in points if system.system.dial)
    if len(turned) > 1:
        axis.plot(*zip(*turned, strict=True), color=_COLORS["conserve"], lw=1.2, alpha=0.5)
    labelled: set[str] = set()
    for system, itl, share in points:
        kind = system.system.kind
        label = f"{kind}, {name}"
        axis.scatter(
            *(itl, share),
            s=45,
            marker=marker,
            color=_COLORS[kind],
            label=None if label in labelled else label,
            zorder=3,
        )
        labelled.add(label)
        text = system.system.dial or system.name
        axis.annotate(text, (itl, share), xytext=(6, 4), textcoords="offset points", fontsize=8)
    online = next((s.online for s in systems if s.system.is_online_baseline), None)
    if online is not None and online.completed:
        axis.axvline(online.itl_ms.p99, color="0.4", ls=":", lw=1.2)
    return True
