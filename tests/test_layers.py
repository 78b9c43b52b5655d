"""The house keeps its order: what imports what, and what stays light.

The design's order is `config, policy <- checkpoint, batch <- engine, ingress <- plugin, cli`.
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
# directly under the package.
_LEAVES = {"errors"}
MAY_IMPORT = {
    "__init__": _LEAVES,
    "errors": set(),
    "json_lines": set(),
    "machine": set(),
    "emulation": _LEAVES,
    "shapes": set(),
    "strict_yaml": {"shapes", *_LEAVES},
    "compat": _LEAVES,
    "policy": set(),
    "config": {"policy", "strict_yaml", *_LEAVES},
    "settings": {"config", "shapes", *_LEAVES},
    "checkpoint": {"config", "policy", *_LEAVES},
    "batch": {"config", "jobs", *_LEAVES},
    "ingress": {"config", "policy", "checkpoint", "batch", *_LEAVES},
    "profile": {"policy", *_LEAVES},
    "engine": {
        "config",
        "policy",
        "checkpoint",
        "batch",
        "ingress",
        "profile",
        "settings",
        "machine",
        "emulation",
        *_LEAVES,
    },
    # simulate/device.py: the step times of a device.
    "platform": {"emulation", "policy", "simulate", *_LEAVES},
    "jobs": {"json_lines", "shapes", "strict_yaml", *_LEAVES},
    # bench/micro.py times parts of the house.
    "bench": {
        "config",
        "profile",
        "settings",
        "tune",
        "policy",
        "ingress",
        "engine",
        "jobs",
        "json_lines",
        "machine",
        "emulation",
        "strict_yaml",
        *_LEAVES,
    },
    # What a benchmark measures on servers, a simulation works out: one load, one set of figures.
    "simulate": {"bench", "config", "policy", "profile", "strict_yaml", *_LEAVES},
    "plugin": {"batch", "config", "compat", "engine", "ingress", "profile", "settings", *_LEAVES},
    "tune": _LEAVES,
    "doctor": {"config", "compat", "plugin", "profile", "emulation", "__init__", *_LEAVES},
    "cli": {
        "config",
        "compat",
        "doctor",
        "jobs",
        "bench",
        "batch",
        "profile",
        "settings",
        "simulate",
        "tune",
        "__init__",
        *_LEAVES,
    },
}

MAY_IMPORT_SGLANG = {"engine/host.py", "checkpoint/host.py", "plugin.py", "doctor.py"}


def relative(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def part_of(module: str) -> str:
    """`conserve_sgl.jobs.plan` -> `jobs`, `conserve_sgl` -> `__init__`."""
    return [*module.split("."), "__init__"][1]


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
    part = relative(file).split("/")[0].removesuffix(".py")
    assert part in MAY_IMPORT, f"{part} has no place in the order yet: add it to MAY_IMPORT"
    used = {part_of(module_of(name)) for name in ours(file)}
    assert used <= MAY_IMPORT[part] | {part}


def test_the_order_has_no_cycle():
    TopologicalSorter(MAY_IMPORT).prepare()  # raises CycleError, which names the cycle


def test_engine_imports_only_the_arrival_channel_of_ingress():
    used = {
        module_of(name)
        for file in (PACKAGE / "engine").glob("*.py")
        for name in ours(file)
        if part_of(name) == "ingress"
    }
    assert used <= {"conserve_sgl.ingress.arrival"}


def test_no_part_is_named_that_does_not_exist():
    parts = {relative(file).split("/")[0].removesuffix(".py") for file in FILES}
    assert set(MAY_IMPORT) <= parts


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
    "conserve_sgl.jobs",
    "conserve_sgl.bench",
    "conserve_sgl.profile",
    "conserve_sgl.simulate.command",
    "conserve_sgl.simulate.make",
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
    """`conserve eval`, `run-batch` and `tune` on a laptop."""
    declared = tomllib.loads((PACKAGE.parent.parent / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[<>=\[]", line)[0].lower() for line in declared["dependencies"]}
    modules = {"pyyaml": "yaml", "pyzmq": "zmq"}
    there = {modules.get(name, name) for name in names} | {"conserve_sgl", *sys.stdlib_module_names}
    parts = ["cli.py", "tune.py", "settings.py", "config.py", "jobs/*.py", "policy/*.py"]
    parts += ["profile/*.py", "batch/client.py", "batch/validate.py", "batch/schema.py"]
    for file in (file for part in parts for file in PACKAGE.glob(part)):
        assert {name.split(".")[0] for name in imported(file)} <= there, relative(file)


def test_policy_imports_nothing_but_itself_and_plain_python():
    allowed = {"conserve_sgl", "msgspec", *sys.stdlib_module_names}
    fits = {"latency.py": {"numpy", "scipy"}}
    for file in (PACKAGE / "policy").glob("*.py"):
        used = {name.split(".")[0] for name in imported(file)}
        assert used <= allowed | fits.get(file.name, set()), file.name


@pytest.mark.parametrize("module", ["time", "datetime", "asyncio", "threading", "zmq"])
def test_policy_has_no_clock_and_no_input_of_its_own(module):
    used = {name.split(".")[0] for f in (PACKAGE / "policy").glob("*.py") for name in imported(f)}
    assert module not in used
