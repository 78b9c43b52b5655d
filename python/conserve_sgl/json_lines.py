"""Lines of JSON that every reader takes for one line.

JSON may hold U+2028, U+2029 and U+0085 as they are. Python's `splitlines`, and with it the
`iter_lines` of HTTP clients, ends a line at each of them.
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["json_line", "with_escapes"]

_ESCAPES = tuple((chr(c).encode(), b"\\u%04x" % c) for c in (0x85, 0x2028, 0x2029))


def json_line(record: Any) -> bytes:
    """`record` as one line of JSON, its end included."""
    return with_escapes(msgspec.json.encode(record)) + b"\n"


def with_escapes(json: bytes) -> bytes:
    """The same JSON, with those characters, which only its strings can hold, escaped."""
    for raw, escape in _ESCAPES:
        json = json.replace(raw, escape)
    return json
