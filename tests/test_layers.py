"""The house keeps its order: what imports what, and what stays light.

The design's order is `config, policy <- checkpoint <- engine, ingress <- plugin, cli`, and beside
it `client <- jobs, batch <- plugin, cli`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import conserve_sgl
from conserve_sgl.plugin import HOOK_TARGETS

PACKAGE = Path(conserve_sgl.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of the package besides itself. A part is a subpackage or a module
# directly under the package; in FLOORS one further down.
FLOORS = {"bench"}
_LEAVES = {"errors"}
MAY_IMPORT = {
    "__init__": _LEAVES,
    "errors": set(),
    "json_lines": set(),
    "machine": set(),
    "emulation": _LEAVES,
    "shapes": set(),
    "urls": set(),
    "strict_yaml": {"shapes", *_LEAVES},
    "compat": _LEAVES,
    "policy": set(),
    "config": {"policy", "strict_yaml", "urls", *_LEAVES},
    "settings": {"config", "shapes", *_LEAVES},
    # The record of a server, and what shows one from outside.
    "status": {"client", "json_lines", "policy", *_LEAVES},
    "checkpoint": {"config", "policy", *_LEAVES},
    "client": {"json_lines", *_LEAVES},
    "jobs": {"client", "json_lines", "shapes", "strict_yaml", "urls", *_LEAVES},
    "batch": {"client", "config", "status", "urls", *_LEAVES},
    "ingress": {"config", "policy", "status", *_LEAVES},
    "profile": {"policy", *_LEAVES},
    "engine": {
        "config",
        "policy",
        "checkpoint",
        "ingress",
        "profile",
        "settings",
        "status",
        "machine",
        "emulation",
        "__init__",
        *_LEAVES,
    },
    # The step times of a device: what the simulator and the emulated device share.
    "device": {"policy", "profile", *_LEAVES},
    "platform": {"device", "emulation", "policy", *_LEAVES},
    "bench/__init__": set(),
    "bench/load": {"config", *_LEAVES},
    "bench/report": {"bench/load", "emulation", "json_lines", "machine", *_LEAVES},
    "bench/systems": {
        "bench/load",
        "bench/report",
        "config",
        "emulation",
        "client",
        "profile",
        "settings",
        "strict_yaml",
        "tune",
        *_LEAVES,
    },
    # micro/operations.py times parts of the house.
    "bench/micro": {
        "bench/report",
        "bench/systems",
        "config",
        "engine",
        "ingress",
        "client",
        "policy",
        "profile",
        "status",
        *_LEAVES,
    },
    "bench/command": {"bench/report", "bench/systems", *_LEAVES},
    "bench/demo": {
        "bench/load",
        "bench/report",
        "bench/systems",
        "profile",
        "strict_yaml",
        *_LEAVES,
    },
    "bench/gpu": {"bench/command", "bench/report", "bench/systems", "profile", *_LEAVES},
    # What a benchmark measures on servers, a simulation works out: one load, one set of figures.
    "simulate": {
        "bench/load",
        "bench/report",
        "config",
        "device",
        "policy",
        "profile",
        "strict_yaml",
        *_LEAVES,
    },
    "plugin": {
        "batch",
        "config",
        "compat",
        "engine",
        "ingress",
        "profile",
        "settings",
        "status",
        *_LEAVES,
    },
    "worker": {"plugin"},
    "tune": {"client", "status", *_LEAVES},
    "doctor": {
        "config",
        "compat",
        "engine",
        "plugin",
        "profile",
        "emulation",
        "__init__",
        *_LEAVES,
    },
    "cli": {
        "config",
        "compat",
        "device",
        "doctor",
        "client",
        "jobs",
        "bench/command",
        "bench/gpu",
        "bench/micro",
        "bench/systems",
        "batch",
        "profile",
        "settings",
        "simulate",
        "status",
        "tune",
        "urls",
        "__init__",
        *_LEAVES,
    },
}

MAY_IMPORT_SGLANG = {"engine/host.py", "checkpoint/host.py", "plugin.py", "doctor.py"}


def relative(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def part_of(module: str) -> str:
    """`conserve_sgl.jobs.plan` -> `jobs`, `conserve_sgl.bench.load.record` -> `bench/load`,
    `conserve_sgl` -> `__init__`."""
    first, *rest = [*module.split(".")[1:], "__init__"]
    return f"{first}/{rest[0]}" if first in FLOORS else first


def part_of_file(file: Path) -> str:
    return part_of(".".join([PACKAGE.name, *file.relative_to(PACKAGE).with_suffix("").parts]))


class Source(NamedTuple):
    """What a file imports, with the names taken from a package; its constant texts; what it calls
    that has to do with hooks by its name."""

    imported: list[str]
    texts: list[str]
    called: list[str]


@cache
def source(file: Path) -> Source:
    found = Source([], [], [])
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.imported.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            found.imported.extend(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.texts.append(node.value)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name.endswith(("register", "plugin_hook")):
                found.called.append(ast.unparse(node.func))
    return found


def imported(file: Path) -> list[str]:
    """Every module that `file` imports anywhere, with the names taken from a package."""
    return source(file).imported


def ours(file: Path) -> set[str]:
    """The modules of this package that `file` imports."""
    return {name for name in imported(file) if name.split(".")[0] == "conserve_sgl"}


def module_of(name: str) -> str:
    """`conserve_sgl.compat` for both that and `conserve_sgl.compat.check_version`."""
    path = PACKAGE.parent / Path(*name.split("."))
    is_module = path.is_dir() or path.with_suffix(".py").is_file()
    return name if is_module else name.rpartition(".")[0]


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_imports_run_one_way(file):
    part = part_of_file(file)
    assert part in MAY_IMPORT, f"{part} has no place in the order yet: add it to MAY_IMPORT"
    used = {part_of(module_of(name)) for name in ours(file)}
    assert used <= MAY_IMPORT[part] | {part}


def test_the_order_has_no_cycle():
    TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError, which names the cycle


def test_engine_imports_only_the_channels_of_ingress():
    used = {
        module_of(name)
        for file in (PACKAGE / "engine").rglob("*.py")
        for name in ours(file)
        if part_of(name) == "ingress"
    }
    assert used <= {"conserve_sgl.ingress.arrival", "conserve_sgl.ingress.spare"}


def test_no_part_is_named_that_does_not_exist():
    assert set(MAY_IMPORT) <= {part_of_file(file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_sglang_is_imported_only_where_the_host_is_met(file):
    if relative(file) in MAY_IMPORT_SGLANG or relative(file).startswith("platform/"):
        return
    foreign = {name for name in imported(file) if name.split(".")[0] == "sglang"}
    assert not foreign, "import it in engine/host.py, which tests/contract pins"


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_only_the_plugin_names_hook_targets(file):
    if relative(file) == "plugin.py":
        return
    named = {t for t in HOOK_TARGETS for text in source(file).texts if t in text}
    assert not named


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_only_the_plugin_registers_hooks(file):
    if relative(file) == "plugin.py":
        return
    for called in source(file).called:
        assert not called.endswith(("HookRegistry.register", "plugin_hook"))


THE_HOSTS = {"policy", "invariant_checker", "batch_result_processor", "waiting_queue"}
"""What `ConserveScheduler` assigns to of SGLang's own; tests/contract knows that they are."""


def scheduler_class() -> tuple[ast.Module, ast.ClassDef]:
    tree = ast.parse((PACKAGE / "engine" / "scheduler.py").read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    return tree, found


def methods_of(node: ast.ClassDef) -> set[str]:
    return {n.name for n in node.body if isinstance(n, ast.FunctionDef)}


def test_the_scheduler_overrides_and_leaves_the_rest_to_objects_that_it_holds():
    _, scheduler = scheduler_class()
    assigned = {
        node.attr
        for node in ast.walk(scheduler)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    }
    assert assigned >= THE_HOSTS
    assert len(assigned - THE_HOSTS) <= 15
    assert len(methods_of(scheduler)) <= 25


def test_the_table_of_the_scheduler_names_what_it_overrides():
    tree, scheduler = scheduler_class()
    _, table = (ast.get_docstring(tree) or "").split("What is overridden of SGLang")
    rows = re.findall(r"^    (\w+) {2,}", table.split("Where an offline request")[0], re.MULTILINE)
    assert len(rows) == len(set(rows))
    assert set(rows) == methods_of(scheduler) - {"is_offline"}


LIGHT = [
    "conserve_sgl",
    "conserve_sgl.policy",
    "conserve_sgl.config",
    "conserve_sgl.compat",
    "conserve_sgl.cli",
    "conserve_sgl.doctor",
    "conserve_sgl.plugin",
    "conserve_sgl.ingress.hooks",
    "conserve_sgl.platform",
    "conserve_sgl.client.http",
    "conserve_sgl.client.progress",
    "conserve_sgl.jobs",
    "conserve_sgl.batch.run_batch",
    "conserve_sgl.bench.command",
    "conserve_sgl.profile.measure",
    "conserve_sgl.simulate.command",
    "conserve_sgl.device.make",
    "conserve_sgl.status.command",
    "conserve_sgl.tune",
]
HEAVY = ("torch", "sglang", "transformers")

REPORT_HEAVY = f"""
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    heavy = [m for m in {HEAVY!r} if m in sys.modules]
    assert not heavy, f"importing {{name}} imports {{heavy}}"
"""


def test_light_modules_import_neither_torch_nor_sglang():
    # One process for all; the assertion names the first module that is not light.
    done = subprocess.run(
        [sys.executable, "-c", REPORT_HEAVY, *LIGHT], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_what_works_without_sglang_imports_only_what_is_installed_with_it():
    """`conserve eval`, `run-batch`, `status` and `tune` on a laptop."""
    declared = tomllib.loads((PACKAGE.parent.parent / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=\[]", line)[0].lower() for line in declared["dependencies"]}
    modules = {"pyyaml": "yaml", "pyzmq": "zmq"}
    there = {modules.get(name, name) for name in names} | {"conserve_sgl", *sys.stdlib_module_names}
    parts = ["cli.py", "tune.py", "settings.py", "config.py", "client/*.py", "jobs/*.py"]
    parts += ["batch/*.py", "policy/**/*.py", "profile/*.py", "status/*.py"]
    for file in (file for part in parts for file in PACKAGE.glob(part)):
        assert {name.split(".")[0] for name in imported(file)} <= there, relative(file)


# The plan of a profile's shapes lies beside what keeps them, and is as pure as a policy.
PURE = [*(PACKAGE / "policy").rglob("*.py"), PACKAGE / "profile" / "plan.py"]


def test_policy_imports_nothing_but_itself_and_plain_python():
    allowed = {"conserve_sgl", "msgspec", *sys.stdlib_module_names}
    fits = {"policy/latency/fit.py": {"numpy", "scipy"}}
    for file in PURE:
        used = {name.split(".")[0] for name in imported(file)}
        assert used <= allowed | fits.get(relative(file), set()), relative(file)


@pytest.mark.parametrize("module", ["time", "datetime", "asyncio", "threading", "zmq"])
def test_policy_has_no_clock_and_no_input_of_its_own(module):
    used = {name.split(".")[0] for file in PURE for name in imported(file)}
    assert module not in used
