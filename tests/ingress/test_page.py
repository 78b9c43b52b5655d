"""The page's layer: what it answers, and to whom; tests/engine/test_page.py has the page itself."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from starlette.responses import PlainTextResponse

from conserve_sgl.ingress import page
from conserve_sgl.ingress.middleware import ServiceClassMiddleware
from conserve_sgl.ingress.page import PAGE_PATH, StatusPage

FOLDER = Path(page.__file__).parent
LOADED = ["page.css", "page.js", "icon.svg", "uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE"]
OURS = ["index.html", "page.css", "page.js", "icon.svg"]


@pytest.fixture
def http() -> httpx.AsyncClient:
    """Around an application that is behind a key: it lets nobody in."""
    app = ServiceClassMiddleware(
        StatusPage(PlainTextResponse("Unauthorized", 401)), max_offline=1, retry_after_s=1
    )
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


@pytest.mark.parametrize("prefix", ["", "/offline"])
async def test_it_is_there_without_a_key_and_all_that_it_names(http, prefix):
    answer = await http.get(f"{prefix}{PAGE_PATH}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:href|src)="(?!#)([^"]+)"', answer.text)
    assert sorted(named) == sorted(f"conserve/{name}" for name in LOADED)
    for address in named:
        assert (await http.get(f"{prefix}/{address}")).status_code == 200, address


@pytest.mark.parametrize("path", ["", *(f"/{name}" for name in LOADED)])
async def test_it_may_load_nothing_from_elsewhere(http, path):
    answer = await http.head(f"{PAGE_PATH}{path}")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'self';")
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", OURS)
def test_no_file_of_ours_names_another_host(name):
    text = (FOLDER / name).read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"']+", text)) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/conserve/status"),
        ("GET", "/conserve/__init__.py"),
        ("GET", "/conserve/../plugin.py"),
        ("GET", "/conserved"),
        ("GET", "/"),
        ("POST", "/conserve"),
    ],
)
async def test_all_else_is_the_application_s(http, method, path):
    assert (await http.request(method, path)).text == "Unauthorized"


@pytest.mark.parametrize("prefix", ["", "/offline"])
async def test_with_a_slash_at_its_end_it_moves_to_where_its_files_are_found(http, prefix):
    answer = await http.get(f"{prefix}{PAGE_PATH}/", follow_redirects=True)
    assert answer.status_code == 200
    assert answer.url.path == f"{prefix}{PAGE_PATH}"


async def test_it_stands_below_the_server_s_root_path():
    transport = httpx.ASGITransport(StatusPage(PlainTextResponse("no")), root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert "<title>conserve</title>" in (await http.get("/llm/conserve")).text


def test_the_chart_library_keeps_its_licence():
    assert "The MIT License" in (FOLDER / "uPlot.LICENSE").read_text(encoding="utf-8")
    assert "uPlot (v1.6.32)" in (FOLDER / "uPlot.iife.min.js").read_text(encoding="utf-8")
