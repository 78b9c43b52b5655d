"""What is wrong with a value that does not fit its type, in words for the person who wrote it.

msgspec finds the fault and speaks of `int | null` and `object`; here it becomes "must be a whole
number of at least 1, not the text 'many'".
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from datetime import date
from decimal import Decimal

import msgspec
from msgspec import inspect

__all__ = ["Fault", "explain", "shown"]

_FAULT = re.compile(r"^(?P<reason>.*?)(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL)
_STEP = re.compile(r"\.(?P<key>[^.\[]+)|\[(?P<index>\d+|\.\.\.)\]")
_UNKNOWN = re.compile(r"^Object contains unknown field `(?P<key>.+)`$", re.DOTALL)
_MISSING = re.compile(r"^Object missing required field `(?P<key>.+)`$", re.DOTALL)
_ILL_TYPED = re.compile(r"^(Expected `|Invalid (enum )?value )")

_SHOWN_CHARACTERS = 60


class Fault(msgspec.Struct, frozen=True):
    """One fault.

    Args:
        steps: the way to the value from the outermost one: keys, and indices as text.
        key: the same way as one dotted key; None for the outermost value itself.
        reason: what is wrong, as one sentence without a full stop.

    """

    steps: tuple[str, ...]
    key: str | None
    reason: str


def explain(error: msgspec.ValidationError, type_: object, value: object) -> Fault:
    """Why msgspec did not take `value` for a `type_`."""
    found = _FAULT.match(str(error))
    assert found is not None  # the pattern matches any text
    reason, path = found["reason"], found["path"] or ""
    steps = tuple(step["key"] or step["index"] for step in _STEP.finditer(path))
    shapes = _alternatives(inspect.type_info(type_))
    for step in steps:
        shapes, value = list(_below(shapes, value, step)), _value_below(value, step)
    key = path.removeprefix(".") or None
    if unknown := _UNKNOWN.match(reason):
        key = f"{key}.{unknown['key']}" if key else unknown["key"]
        return Fault((*steps, unknown["key"]), key, f"unknown key{_known(shapes, value)}")
    if missing := _MISSING.match(reason):
        reason = f"needs the key {missing['key']}{_shape_of(shapes, value, missing['key'])}"
    elif _ILL_TYPED.match(reason) and shapes:
        reason = f"must be {_words(shapes)}, not {shown(value)}{_hint(shapes, value)}"
    return Fault(steps, key, reason)


def shown(value: object) -> str:
    """`value` in a sentence, cut where it is long."""
    if value is None:
        return "null (a key without a value)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, str):
        return f"the text {_cut(repr(value))}" if value else "an empty text"
    if isinstance(value, dict):
        return "a section of keys" if value else "an empty section"
    if isinstance(value, list | tuple | set):
        return "a list" if value else "an empty list"
    return f"a date: {value}" if isinstance(value, date) else f"a {type(value).__name__}"


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[: _SHOWN_CHARACTERS - 3]}..."


# ------------------------------------------------------------ the way down


def _alternatives(shape: inspect.Type) -> list[inspect.Type]:
    if isinstance(shape, inspect.Metadata):
        return _alternatives(shape.type)
    return list(shape.types) if isinstance(shape, inspect.UnionType) else [shape]


def _below(shapes: Iterable[inspect.Type], value: object, step: str) -> Iterator[inspect.Type]:
    """What may stand one step below `shapes`, given the value that is there."""
    structs = [shape for shape in shapes if isinstance(shape, inspect.StructType)]
    if structs and step == structs[0].tag_field:
        yield inspect.LiteralType(tuple(shape.tag for shape in structs))
        return
    for shape in shapes:
        if isinstance(shape, inspect.ListType | inspect.VarTupleType | inspect.SetType):
            yield from _alternatives(shape.item_type)
        elif isinstance(shape, inspect.DictType):
            yield from _alternatives(shape.value_type)
        elif isinstance(shape, inspect.StructType) and _is_tagged(shape, value):
            for field in shape.fields:
                if field.encode_name == step:
                    yield from _alternatives(field.type)


def _value_below(value: object, step: str) -> object:
    if isinstance(value, dict):
        return value.get(step)
    is_there = isinstance(value, list | tuple) and step.isdigit() and int(step) < len(value)
    return value[int(step)] if is_there else None


def _is_tagged(shape: inspect.StructType, value: object) -> bool:
    if shape.tag_field is None or not isinstance(value, dict):
        return True
    return value.get(shape.tag_field, shape.tag) == shape.tag


# ----------------------------------------------------------------- in words


def _known(shapes: Iterable[inspect.Type], value: object) -> str:
    names = [
        field.encode_name
        for shape in shapes
        if isinstance(shape, inspect.StructType) and _is_tagged(shape, value)
        for field in shape.fields
    ]
    return f"; there are {_joined(names, 'and')}" if names else ""


def _shape_of(shapes: Iterable[inspect.Type], value: object, key: str) -> str:
    wanted = list(_below(shapes, value, key))
    return f", {_words(wanted)}" if wanted else ""


def _words(shapes: Iterable[inspect.Type]) -> str:
    shapes = sorted(shapes, key=lambda shape: isinstance(shape, inspect.NoneType))
    structs = [shape for shape in shapes if isinstance(shape, inspect.StructType)]
    if len(structs) > 1:  # msgspec takes several only with a tag in each
        tags = _joined([f"{shape.tag_field}: {shape.tag}" for shape in structs], "or")
        rest = [_word(shape) for shape in shapes if shape not in structs]
        return _joined([f"a section with {tags}", *rest], "or")
    return _joined(list(dict.fromkeys(_word(shape) for shape in shapes)), "or")


def _word(shape: inspect.Type) -> str:
    match shape:
        case inspect.IntType():
            return f"a whole number{_bounds(shape)}"
        case inspect.FloatType():
            return f"a number{_bounds(shape)}"
        case inspect.StrType(pattern=pattern) if pattern is not None:
            return f"text that matches {pattern}"
        case inspect.StrType(min_length=least):
            return "text that is not empty" if least else "text"
        case inspect.BoolType():
            return "true or false"
        case inspect.NoneType():
            return "null"
        case inspect.LiteralType(values=values):
            return _joined([str(value) for value in values], "or")
        case inspect.ListType() | inspect.VarTupleType() | inspect.SetType():
            return f"a list{' that is not empty' if shape.min_length else ''}"
        case inspect.StructType(fields=fields):
            return f"a section of keys ({', '.join(field.encode_name for field in fields)})"
        case inspect.DictType():
            return "a section of keys"
        case _:
            return "another kind of value"


def _bounds(shape: inspect.IntType | inspect.FloatType) -> str:
    if shape.ge is not None and shape.le is not None:
        return f" from {_number(shape.ge)} to {_number(shape.le)}"
    least = f" above {_number(shape.gt)}" if shape.gt is not None else ""
    least = f" of at least {_number(shape.ge)}" if shape.ge is not None else least
    if shape.le is None:
        return least
    return (
        f"{least} and at most {_number(shape.le)}" if least else f" of at most {_number(shape.le)}"
    )


def _number(value: float) -> str:
    """As YAML 1.1 reads it again: without an exponent."""
    if isinstance(value, float) and math.isfinite(value):
        value = int(value) if value.is_integer() else Decimal(repr(value))
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def _joined(words: list[str], last: str) -> str:
    return f" {last} ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _hint(shapes: list[inspect.Type], value: object) -> str:
    """How to write what was meant, where YAML reads it as something else."""
    wanted = {type(shape) for shape in shapes}
    if isinstance(value, str) and wanted & {inspect.IntType, inspect.FloatType}:
        try:
            number = _number(float(value))
        except ValueError:
            return ""
        is_short = len(number) < _SHOWN_CHARACTERS and math.isfinite(float(value))
        return f"; as a number it is written {number}" if is_short else ""
    if isinstance(value, bool | int | float | date) and inspect.StrType in wanted:
        return "; in quotes it is text"
    return ""
