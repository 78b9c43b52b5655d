"""Base URLs of servers, as people write them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

__all__ = ["check_base_url"]


def check_base_url(url: str) -> None:
    """Raise ValueError unless `url` is a server's base URL."""
    if not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", url) or not url.isprintable():
        raise ValueError(f"{url!r} is not a base URL such as http://127.0.0.1:30000")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError as e:  # UnicodeError is one: a name that cannot be looked up
        raise ValueError(f"{url!r} is not a URL: {e}") from e
    if not host or port == 0:
        raise ValueError(f"{url!r} has no {'port' if host else 'host'}")
    if re.search(r"/(v1|generate)(/|$)", url):
        raise ValueError(f"give {url!r} without /v1 or /generate; they are added")
