"""Reads a YAML file into a frozen msgspec struct, and says exactly what is wrong when it cannot.

The struct types carry `forbid_unknown_fields=True`; msgspec then finds the fault and gives its
path (`$.slo.ttft_ms`), `shapes` puts it into words, and the composed YAML nodes give the line.

Whatever a file holds, reading it takes time and memory in proportion to its size, and ends in a
value or in one `InputError`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from conserve_sgl.errors import InputError
from conserve_sgl.shapes import explain

__all__ = ["load_yaml", "read_text"]

T = TypeVar("T")

_UNUSABLE = re.compile("[\0\ud800-\udfff]")  # ends a path; is half of a character

_MAX_DEPTH = 64
_MAX_ALIASED = 100_000
_MAX_NUMBER = 2.0**63
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


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
    node, value = _composed(path, read_text(path))
    value = {} if value is None else value
    for key, text in changes.items():
        _change(value, key, text)
    try:
        return msgspec.convert(value, type_)
    except msgspec.ValidationError as e:
        fault = explain(e, type_, value)
        if (changed := _changed(changes, fault.steps)) is not None:
            reason = fault.reason if fault.key == changed else f"{fault.key}: {fault.reason}"
            raise _bad_change(changed, changes[changed], reason) from e
        line = _line_of(node, fault.steps)
        raise InputError(path, _sentence(fault.reason), line=line, key=fault.key) from e
    except (OverflowError, RecursionError, MemoryError) as e:
        # Of a pattern or template inside that compiles to something enormous.
        raise InputError(path, f"holds a text that cannot be used: {e}") from e


def _change(value: Any, key: str, text: str) -> None:
    *path, last = key.split(".")
    for step in path:
        value = value.setdefault(step, {}) if isinstance(value, dict) else None
    if not isinstance(value, dict):
        raise _bad_change(key, text, "there is no such key")
    try:
        _, value[last] = _composed(key, text)
    except InputError as e:
        raise _bad_change(key, text, e.reason) from e


def _changed(changes: Mapping[str, str], steps: tuple[str, ...]) -> str | None:
    """The change that the place of a fault lies in, or that lies in that place."""
    for key in changes if steps else ():
        if all(a == b for a, b in zip(key.split("."), steps, strict=False)):
            return key
    return None


def _bad_change(key: str, text: str, reason: str) -> InputError:
    return InputError(f"{key}={text}", reason)


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise InputError(path, f"is not UTF-8 text: {e.reason}") from e
    except OSError as e:
        raise InputError(path, f"cannot be read: {e.strerror or e}") from e
    except ValueError as e:  # a name that no file system takes
        raise InputError(path, f"cannot be read: {e}") from e


class _Loader(yaml.SafeLoader):
    """PyYAML's own, which recurses into what it composes: to a depth that is bounded."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth > _MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(problem="nested too deeply", problem_mark=mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _composed(path: Path | str, text: str) -> tuple[yaml.Node | None, Any]:
    """The document's nodes and what they stand for; None for an empty document."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, None
        _Check(path).run(node)
        value = loader.construct_document(node)
    except yaml.MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else None
        raise InputError(path, f"is not YAML: {e.problem}", line=line) from e
    except yaml.reader.ReaderError as e:
        line = text.count("\n", 0, e.position) + 1
        raise InputError(
            path, f"is not YAML: holds the character {e.character:#x}", line=line
        ) from e
    except (ValueError, OverflowError) as e:  # an escape such as \UFFFFFFFF
        line = loader.line + 1 if loader else None
        raise InputError(path, f"is not YAML: {e}", line=line) from e
    return node, value


class _Check:
    """Refuses, with its place, what YAML allows and a configuration does not.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path | str) -> None:
        self._path = path
        self._sizes: dict[yaml.Node, int] = {}  # with all that is below, aliases written out
        self._open: set[yaml.Node] = set()  # on the way from the outermost node to this one
        self._aliased = 0

    def run(self, node: yaml.Node, key: str = "") -> int:
        """Check `node`, which stands at `key`, and all below it; how many nodes that are."""
        if node in self._open:
            raise self._fault("an alias stands for itself", node, key)
        if (size := self._sizes.get(node)) is not None:
            self._aliased += size
            if self._aliased > _MAX_ALIASED:
                raise self._fault("aliases make it too large", node, key)
            return size
        self._open.add(node)
        size = 1 + self._below(node, key)
        self._open.remove(node)
        self._sizes[node] = size
        return size

    def _below(self, node: yaml.Node, key: str) -> int:
        if isinstance(node, yaml.SequenceNode):
            return sum(self.run(child, f"{key}[{i}]") for i, child in enumerate(node.value))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key)
        self._scalar(node, key)
        return 0

    def _mapping(self, node: yaml.MappingNode, key: str) -> int:
        seen: set[str] = set()
        size = 0
        for key_node, child in node.value:
            if key_node.tag not in (_TEXT, _MERGE) or not isinstance(key_node, yaml.ScalarNode):
                reason = "has a key that is not text; put it in quotes if it is meant so"
                raise self._fault(reason, key_node, key)
            below = f"{key}.{key_node.value}".lstrip(".")
            if key_node.value in seen:
                raise self._fault("is given twice", key_node, below)
            if key_node.tag == _TEXT:
                self._scalar(key_node, below)
            seen.add(key_node.value)
            size += 1 + self.run(child, below)
        return size

    def _scalar(self, node: yaml.Node, key: str) -> None:
        try:
            value = yaml.constructor.SafeConstructor().construct_object(node)
        except yaml.YAMLError:
            raise
        except Exception as e:  # PyYAML raises whatever it stumbles over
            kind = node.tag.rpartition(":")[2]
            raise self._fault(f"{node.value[:60]!r} is no {kind}", node, key) from e
        if isinstance(value, int | float) and not abs(value) <= _MAX_NUMBER:
            raise self._fault(f"{node.value[:60]} is no number that can be used", node, key)
        if isinstance(value, str) and (sign := _UNUSABLE.search(value)):
            reason = f"holds {sign[0]!a}, which no text here may"
            raise self._fault(reason, node, key)

    def _fault(self, reason: str, node: yaml.Node, key: str) -> InputError:
        return InputError(self._path, reason, line=node.start_mark.line + 1, key=key or None)


def _sentence(reason: str) -> str:
    return reason[:1].lower() + reason[1:]


def _line_of(root: yaml.Node | None, steps: tuple[str, ...]) -> int:
    node, line = root, 1 if root is None else root.start_mark.line + 1
    for step in steps:
        found = _descend(node, step)
        if found is None:
            break
        node, line = found
    return line


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
