"""The pages that list something list all of it, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from conserve_sgl import compat
from conserve_sgl.config import CONFIG_ENV, ConserveConfig, Folder
from conserve_sgl.emulation import DEVICE_ENV, SCALE_ENV
from conserve_sgl.ingress.classify import (
    OFFLINE_PREFIX,
    AskedJob,
    class_from_body,
    class_from_headers,
    job_from_body,
    job_from_headers,
)
from conserve_sgl.policy import ServiceClass
from conserve_sgl.profile import DIR_ENV
from conserve_sgl.profile.steps import GRID_ENV, STEP_LOG_ENV

DOCS = Path(__file__).resolve().parent.parent / "docs"
CONFIGURATION = (DOCS / "configuration.md").read_text(encoding="utf-8")
SERVICE_CLASS = (DOCS / "service-class.md").read_text(encoding="utf-8")


def keys_of(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every key of a configuration, dotted, with its default."""
    for field in msgspec.structs.fields(struct):
        name = f"{prefix}{field.name}"
        default = field.default
        if default is msgspec.NODEFAULT:
            default = field.default_factory()
        if isinstance(default, msgspec.Struct):
            yield from keys_of(type(default), f"{name}.")
        else:
            yield name, default


def keys_in(page: str) -> Iterator[tuple[str, list[str]]]:
    """Every row of the page's tables of keys: its dotted key, and its other cells."""
    section = None
    for line in page.splitlines():
        if line.startswith("## "):
            heading = re.fullmatch(r"## `(\w+)`", line)
            section = heading[1] if heading else None
        elif section and (row := re.fullmatch(r"\| `(\w+)` \|(.+)\|", line)):
            yield f"{section}.{row[1]}", [cell.strip() for cell in row[2].split("|")]


KEYS = dict(keys_of(ConserveConfig))
ROWS = list(keys_in(CONFIGURATION))


def test_the_page_lists_every_key_once_and_no_other():
    assert sorted(key for key, _ in ROWS) == sorted(KEYS)


def test_the_page_has_a_section_for_every_section_and_no_other():
    assert re.findall(r"^## `(\w+)`$", CONFIGURATION, re.MULTILINE) == list(
        ConserveConfig.__struct_fields__
    )


def _as_yaml(value: object) -> str:
    return json.dumps(value).strip('"')  # true and null, not True and None


@pytest.mark.parametrize(("key", "cells"), ROWS, ids=[key for key, _ in ROWS])
def test_a_row_says_default_range_meaning_and_occasion(key, cells):
    default, unit_and_range, meaning, occasion = cells
    assert default == _as_yaml(KEYS[key])
    assert unit_and_range.endswith(tuple(RANGES))
    assert len(meaning.split()) > 3
    assert len(occasion.split()) > 3


def bounds(type_) -> tuple:
    (meta,) = type_.__metadata__
    return meta.gt, meta.ge, meta.le


RANGES = {
    "at least 0": lambda type_: bounds(type_) == (None, 0, None),
    "at least 1": lambda type_: bounds(type_) == (None, 1, None),
    "above 0": lambda type_: bounds(type_) == (0, None, None),
    "true or false": lambda type_: type_ is bool,
    "`eager` or `slack`": lambda type_: get_args(type_) == ("eager", "slack"),
    "`queue` or `spare`": lambda type_: get_args(type_) == ("queue", "spare"),
    "`run` or `held`": lambda type_: get_args(type_) == ("run", "held"),
    "0 to 1": lambda type_: bounds(type_) == (None, 0, 1),
    "above 0 and at most 876600": lambda type_: bounds(type_) == (0, None, 876_600),
    "a folder or null": lambda type_: type_ == Folder | None,
    # Parsed by the section itself; tests/test_config.py has its edges.
    "`ms` above 0 or `x` of at least 1": lambda type_: type_ is str,
    "or null": lambda type_: type_ == str | None,
    "text or null": lambda type_: type_ == str | None,
    "in a list": lambda type_: type_ == list[str],
}


@pytest.mark.parametrize(("key", "cells"), ROWS, ids=[key for key, _ in ROWS])
def test_a_row_gives_the_range_that_is_checked(key, cells):
    section, name = key.split(".")
    struct = type(getattr(ConserveConfig(), section))
    (field,) = (f for f in msgspec.structs.fields(struct) if f.name == name)
    given = cells[1].rpartition(", ")[2]
    assert RANGES[given](field.type)


@pytest.mark.parametrize(
    "variable",
    [CONFIG_ENV, compat.ALLOW_UNTESTED_ENV, DIR_ENV, GRID_ENV, STEP_LOG_ENV, DEVICE_ENV, SCALE_ENV],
)
def test_the_page_lists_our_environment_variables(variable):
    assert f"| {variable} |" in CONFIGURATION


# ------------------------------------------------------- docs/service-class.md


TAGS = SERVICE_CLASS.split("## Tags")[1].split("## ")[0]
JOBS = SERVICE_CLASS.split("## Job and deadline")[1].split("## ")[0]


def test_the_tags_of_the_page_do_what_it_says():
    assert f"`{OFFLINE_PREFIX}/" in TAGS
    for header in re.findall(r"^\| header \| `([^`]+)` \|", TAGS, re.MULTILINE):
        name, value = header.split(": ")
        found = class_from_headers([(name.lower().encode(), value.encode())])
        assert found is ServiceClass.OFFLINE
    bodies = re.findall(r'^\| body \| `("service_tier": [^`]+)` \|', TAGS, re.MULTILINE)
    assert [class_from_body(f"{{{body}}}".encode()) for body in bodies] == [ServiceClass.OFFLINE]


def test_the_page_names_both_headers():
    named = re.findall(r"^\| header \| `([^`:]+): ", TAGS, re.MULTILINE)
    assert named == ["x-sgl-conserve-class", "x-smg-priority"]


def test_the_job_tags_of_the_page_do_what_it_says():
    headers = re.findall(r"`(x-[\w-]+): (\w+)`", JOBS)
    assert len(headers) == 4
    for name, stands_for in headers:
        value = "nightly" if stands_for == "NAME" else "60000"
        job = job_from_headers([(name.encode(), value.encode())])
        seconds = {"NAME": None, "SECONDS": 60000.0, "MILLISECONDS": 60.0}[stands_for]
        assert job == AskedJob("nightly" if stands_for == "NAME" else None, seconds)
    bodies = re.findall(r'`("metadata": [^`]+)`', JOBS)
    filled = [body.replace("NAME", "a").replace("SECONDS", "60") for body in bodies]
    asked = [job_from_body(f"{{{body}}}".encode()) for body in filled]
    assert asked == [AskedJob(job="a"), AskedJob(left_s=60.0)]


def test_the_python_examples_of_the_page_are_python():
    examples = re.findall(r"```python\n(.*?)```", SERVICE_CLASS, re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        compile(example, "docs/service-class.md", "exec")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_every_file_that_a_page_names_is_there(page):
    named = re.findall(r"(?:configs|docs|scripts)/[\w./-]+\.(?:yaml|md|sh|py)", page.read_text())
    missing = [name for name in named if not (DOCS.parent / name).is_file()]
    assert not missing


# ------------------------------------------------------------ docs/structure.md

PACKAGE = Path(compat.__file__).parent
STRUCTURE = (DOCS / "structure.md").read_text(encoding="utf-8")
FLOORS = re.split(
    r"^### `([a-z]+)/`", STRUCTURE.split("## Where do I change")[0], flags=re.MULTILINE
)[1:]
FLOOR_PAGES = dict(zip(FLOORS[::2], FLOORS[1::2], strict=True))


def test_every_folder_is_a_floor_of_the_page():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(FLOOR_PAGES) == folders


@pytest.mark.parametrize("floor", FLOOR_PAGES)
def test_a_floor_names_what_is_there_and_all_of_it(floor):
    page = FLOOR_PAGES[floor]
    named = set(re.findall(r"`([a-z_]+\.py)`", page))
    named |= {f"{folder}/" for folder in re.findall(r"`([a-z_]+)/`", page)} - {
        "policy/",
        "profile/",
    }
    there = {p.name for p in (PACKAGE / floor).glob("*.py")} - {"__init__.py"}
    folders = {f"{p.parent.name}/" for p in (PACKAGE / floor).glob("*/__init__.py")}
    below = {p.name for folder in folders for p in (PACKAGE / floor / folder).glob("*.py")}
    assert there | folders <= named
    assert named - {"shipped/"} <= there | folders | below


@pytest.mark.parametrize("floor", FLOOR_PAGES)
def test_a_floor_fits_on_a_screen(floor):
    assert len(FLOOR_PAGES[floor]) < 1500


def test_places_to_change_exist():
    places = re.findall(r"`([a-z_/]+(?:\.py|/))`", STRUCTURE.split("## Where do I change")[1])
    assert [p for p in places if not (PACKAGE / p).exists()] == []


# ------------------------------------------------------------------ docs/models.md


def test_the_matrix_of_models_names_tests_that_are_there(checkout: Path):
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    matrix, legend = page.split("## What was run")[1].split("| in the table |")
    named = re.findall(r"^\| (\w+) \| `(test_\w+\.py)`: (.+) \|$", legend, re.MULTILINE)
    assert len(named) == 9
    for word, file, tests in named:
        assert word in matrix
        source = (checkout / "tests" / "engine" / file).read_text(encoding="utf-8")
        for test in re.findall(r"`(\w+)`", tests):
            assert f"def {test}(" in source, test
