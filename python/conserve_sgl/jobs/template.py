"""Jinja templates over one input line: sandboxed, and strict about names that are not there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["TemplateFault", "compile_expression", "compile_template"]

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, autoescape=False)


class TemplateFault(ValueError):
    """A template cannot be compiled, or cannot be rendered for a line; its text says why."""


@lru_cache(maxsize=1024)
def compile_template(source: str) -> Callable[[Mapping[str, object]], str]:
    """A function from a line's fields to text. One newline at the end of `source` is dropped.

    Raises:
        TemplateFault: bad syntax, here; a missing field or a failing filter, in the function.
    """
    try:
        template = _ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as e:
        raise TemplateFault(f"line {e.lineno} of the template: {e.message}") from e
    return lambda fields: _guarded(template.render, fields)


@lru_cache(maxsize=1024)
def compile_expression(source: str) -> Callable[[Mapping[str, object]], object]:
    """A function from a line's fields to the value of the expression `source`, any JSON type.

    Raises:
        TemplateFault: as `compile_template`.
    """
    try:
        expression = _ENVIRONMENT.compile_expression(source, undefined_to_none=False)
    except jinja2.TemplateSyntaxError as e:
        raise TemplateFault(f"the expression: {e.message}") from e
    return lambda fields: _guarded(lambda values: _defined(expression(values)), fields)


def _defined(value: object) -> object:
    if isinstance(value, jinja2.Undefined):
        str(value)  # a strict undefined raises as soon as it is used
    return value


def _guarded(render: Callable[[Mapping[str, object]], object], fields: Mapping[str, object]):
    # Filters and operators run on the user's data and raise what they like (ZeroDivisionError,
    # IndexError from a list, TypeError): every one of them is a fault of this line.
    try:
        return render(fields)
    except Exception as e:
        raise TemplateFault(f"{e}" if isinstance(e, jinja2.UndefinedError) else repr(e)) from e
