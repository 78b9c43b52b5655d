"""A Prometheus gets the names that boards and alerts ask for, whatever it accepts."""

from __future__ import annotations

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter, make_asgi_app
from starlette.applications import Starlette
from starlette.routing import Mount

from conserve_sgl.ingress.metric_names import WholeMetricNames

PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5,*/*;q=0.1"
)


@pytest.mark.parametrize("accept", [PROMETHEUS_2, PROMETHEUS_3, "text/plain;version=0.0.4", "*/*"])
async def test_names_keep_their_colon(accept):
    registry = CollectorRegistry()
    Counter("conserve:tokens", "Tokens.", registry=registry).inc(3)
    app = Starlette(routes=[Mount("/metrics", make_asgi_app(registry))])
    transport = httpx.ASGITransport(WholeMetricNames(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        answer = await http.get("/metrics/", headers={"accept": accept})
    assert answer.status_code == 200
    assert "\nconserve:tokens_total 3.0\n" in answer.text
