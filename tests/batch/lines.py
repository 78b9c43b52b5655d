"""Lines of input files."""

from __future__ import annotations

import json
from typing import Any

CHAT = "/v1/chat/completions"


def request(name: str, text: str = "hi", **changes: Any) -> dict[str, Any]:
    """A chat line; `body` is changes to its body, and a change to None drops the key."""
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    body |= changes.pop("body", {})
    line = {"custom_id": name, "method": "POST", "url": CHAT, "body": body} | changes
    return {key: value for key, value in line.items() if value is not None}


def jsonl(*lines: Any) -> bytes:
    """The lines of a file; bytes stay as they are."""
    return b"".join(
        line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines
    )


def requests(n: int, **changes: Any) -> bytes:
    """A file of n chat lines r0, r1, ... that say "word 0", "word 1", ..."""
    return jsonl(*(request(f"r{i}", f"word {i}", **changes) for i in range(n)))
