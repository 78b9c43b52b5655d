"""Reads a YAML file into a frozen msgspec struct, and says exactly what is wrong when it cannot.

The struct types carry `forbid_unknown_fields=True`; msgspec then finds the fault and gives its
path (`$.slo.ttft_ms`), and the composed YAML nodes give the line of that path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from conserve_sgl.errors import InputError

__all__ = ["load_yaml"]

T = TypeVar("T")

_FAULT = re.compile(r"^(?P<reason>.*?)(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL)
_STEP = re.compile(r"\.(?P<key>[^.\[]+)|\[(?P<index>\d+|\.\.\.)\]")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<key>.+)`$")
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def load_yaml(path: Path | str, type_: type[T], *, changes: Mapping[str, str] | None = None) -> T:
    """Read one YAML document at `path` as a `type_`.

    Args:
        path: the file.
        type_: what it holds.
        changes: values, as YAML, that stand for those of the file, by dotted key.

    Raises:
        InputError: unreadable file, bad YAML, a repeated, unknown, missing or ill-typed key; the
            error names file, line and key, or the change.
    """
    changes = changes or {}
    path = Path(path)
    try:
        node = yaml.compose(_read(path), Loader=yaml.SafeLoader)
        _check(path, node, "")
        value = (
            None if node is None else yaml.constructor.SafeConstructor().construct_document(node)
        )
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else None
        raise InputError(path, f"is not YAML: {e.problem}", line=line) from e
    except yaml.YAMLError as e:
        raise InputError(path, f"is not YAML: {e}") from e
    except RecursionError as e:
        raise InputError(path, "is nested too deeply, or an alias stands for itself") from e
    value = {} if value is None else value
    for key, text in changes.items():
        _change(value, key, text)
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as e:
        fault = _located(path, node, str(e))
        if (changed := _changed(changes, fault.key)) is None:
            raise fault from e
        reason = fault.reason if fault.key == changed else f"{fault.key}: {fault.reason}"
        raise _bad_change(changed, changes[changed], reason) from e


def _change(value: Any, key: str, text: str) -> None:
    *path, last = key.split(".")
    for step in path:
        value = value.setdefault(step, {}) if isinstance(value, dict) else None
    if not isinstance(value, dict):
        raise _bad_change(key, text, "there is no such key")
    try:
        value[last] = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise _bad_change(key, text, "the value is not YAML") from e


def _changed(changes: Mapping[str, str], key: str | None) -> str | None:
    """The change that the key of a fault lies in, or that lies in what the key names."""
    at = f"{key}."
    inside = (c for c in changes if at.startswith(f"{c}.") or f"{c}.".startswith(at))
    return next(inside, None) if key else None


def _bad_change(key: str, text: str, reason: str) -> InputError:
    return InputError(f"{key}={text}", reason)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as e:
        raise InputError(path, f"cannot be read: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise InputError(path, f"is not UTF-8 text: {e.reason}") from e


def _check(path: Path, node: yaml.Node | None, prefix: str) -> None:
    """Refuse, with its place, what YAML allows and a configuration does not."""
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            _check(path, child, f"{prefix}[{i}]")
    elif isinstance(node, yaml.MappingNode):
        _check_mapping(path, node, prefix)
    elif isinstance(node, yaml.ScalarNode):
        _check_scalar(path, node, prefix)


def _check_mapping(path: Path, node: yaml.MappingNode, prefix: str) -> None:
    seen: set[str] = set()
    for key_node, child in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag not in _KEY_TAGS:
            reason = "has a key that is not text; put it in quotes if it is meant so"
            raise InputError(path, reason, line=line, key=prefix or None)
        key = f"{prefix}.{key_node.value}".lstrip(".")
        if key_node.value in seen:
            raise InputError(path, "is given twice", line=line, key=key)
        seen.add(key_node.value)
        _check(path, child, key)


def _check_scalar(path: Path, node: yaml.ScalarNode, key: str) -> None:
    try:
        yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, KeyError) as e:
        kind = node.tag.rpartition(":")[2]
        reason = f"{node.value!r} is no {kind}"
        raise InputError(path, reason, line=node.start_mark.line + 1, key=key or None) from e


def _located(path: Path, root: yaml.Node | None, message: str) -> InputError:
    fault = _FAULT.match(message)
    assert fault is not None  # the pattern matches any text
    reason, steps = fault["reason"], fault["path"] or ""
    node, line = root, 1 if root is None else root.start_mark.line + 1
    for step in _STEP.finditer(steps):
        found = _descend(node, step["key"] or step["index"])
        if found is None:
            break
        node, line = found
    key = steps.removeprefix(".") or None
    if unknown := _UNKNOWN.match(reason):
        found = _descend(node, unknown["key"])
        line = found[1] if found else line
        key = f"{key}.{unknown['key']}" if key else unknown["key"]
        reason = "unknown key"
    reason = reason[:1].lower() + reason[1:]
    return InputError(path, reason, line=line, key=key)


def _descend(node: yaml.Node | None, key: str) -> tuple[yaml.Node, int] | None:
    """The child of `node` under `key` and the line where a person would look for it."""
    if isinstance(node, yaml.SequenceNode) and key.isdigit() and int(key) < len(node.value):
        child = node.value[int(key)]
        return child, child.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key_node, child in node.value:
            if key_node.value == key:
                return child, key_node.start_mark.line + 1
    return None
