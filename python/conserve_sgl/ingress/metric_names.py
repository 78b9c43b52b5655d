"""Metrics keep their names: `conserve:offline_tokens_total`, whoever asks.

prometheus_client 0.26 writes `conserve_offline_tokens_total` where OpenMetrics is asked for without
a scheme of escaping, as Prometheus 2 does: it takes a name of a metric for one of a label, which
may have no colon. SGLang's names are lost in the same way. In Prometheus' own text format, which
every Prometheus takes, they are whole.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["WholeMetricNames"]

_TEXT = b"text/plain;version=0.0.4"


class WholeMetricNames:
    """An ASGI layer that asks for text where the application's `/metrics` would rename.

    Args:
        app: the application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _is_metrics(scope):
            headers = [
                (name, _TEXT if name == b"accept" and _renames(value) else value)
                for name, value in scope["headers"]
            ]
            scope = {**scope, "headers": headers}
        await self._app(scope, receive, send)


def _is_metrics(scope: Scope) -> bool:
    return scope["path"].removeprefix(scope.get("root_path", "")).startswith("/metrics")


def _renames(accept: bytes) -> bool:
    return b"openmetrics" in accept and b"escaping" not in accept
