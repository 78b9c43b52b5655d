"""The page that shows what the engine does, and why: `/conserve`, and the few files that it loads.

It says nothing of the server, so it needs no key: it asks its reader for one where `GET
/conserve/status` wants it. Everything it loads is in this folder; its Content-Security-Policy
allows nothing else.
"""

from __future__ import annotations

from pathlib import Path

from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["PAGE_PATH", "StatusPage"]

PAGE_PATH = "/conserve"

_FOLDER = Path(__file__).parent
_FILES = {
    "": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/uPlot.iife.min.js": ("uPlot.iife.min.js", "text/javascript"),
    "/uPlot.min.css": ("uPlot.min.css", "text/css"),
    "/uPlot.LICENSE": ("uPlot.LICENSE", "text/plain"),
}
"""By what comes after `PAGE_PATH`."""

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # The page of an earlier version would not understand the server of a later one.
    "Cache-Control": "no-cache",
}


class StatusPage:
    """An ASGI layer that answers for the page, and passes everything else on.

    Args:
        app: the application, behind whose key rules the page does not stand.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._answers: dict[str, Response] = {
            f"{PAGE_PATH}{path}": Response((_FOLDER / name).read_bytes(), 200, _HEADERS, kind)
            for path, (name, kind) in _FILES.items()
        }
        # Its own addresses are relative, to work behind any prefix.
        self._answers[f"{PAGE_PATH}/"] = RedirectResponse(f"..{PAGE_PATH}", headers=_HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            app = self._answers.get(path, app)
        await app(scope, receive, send)
