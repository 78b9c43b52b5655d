"""Fixtures that every test folder shares."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.server import Server, Servers, models_unused

CHECKOUT = Path(__file__).resolve().parent.parent

gc.disable()  # until the modules of the tests are imported: it would take a fifth of that time

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers have a core each: a second thread of torch would only wait for the first, busily.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # All that they speak is plain HTTP, for which every client of httpx would read certificates.
    os.environ.setdefault("SSL_CERT_DIR", str(CHECKOUT))


# Every scheduler would import all 250, which takes it two seconds of each start.
os.environ.setdefault("SGLANG_DISABLED_MODEL_ARCHS", models_unused())


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The root of the checkout."""
    return CHECKOUT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real traces and eval sets beside the checkout (CONSERVE_TEST_DATA says where else)."""
    path = Path(os.environ.get("CONSERVE_TEST_DATA", CHECKOUT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}: set CONSERVE_TEST_DATA")
    return path


SHARED_SERVERS = ("stock_texts", "smollm2_server", "plain_server")
"""Fixtures whose tests stand together at the end, in this order: what they run on starts once."""


def pytest_collection_finish() -> None:
    gc.freeze()  # what is imported stays; no collection needs to look at it
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    names = (i for i, name in enumerate(SHARED_SERVERS, start=1) if name in item.fixturenames)
    return next(names, 0)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from support.tiny_models import make_tiny_model  # imports transformers, for the engine tier

    return make_tiny_model(tmp_path_factory.mktemp("tiny-llama"), arch="llama")


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    profiles = tmp_path_factory.mktemp("profiles")
    servers = Servers(lambda: tmp_path_factory.mktemp("server"), profiles)
    yield servers
    servers.close()


@pytest.fixture(scope="session")
def start_server(servers: Servers) -> Callable[..., Any]:
    """A context manager that runs one server: `with start_server(model, "--flag") as server`."""
    return servers.start


@pytest.fixture(scope="module")
def no_other_server(servers: Servers) -> None:
    """For tests that start engines in ways of their own: one that idles keeps a core busy."""
    servers.stop()


@pytest.fixture(scope="session")
def plain_profiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `plain_server` finds no latency profile, and leaves one."""
    return tmp_path_factory.mktemp("plain-profiles")


@pytest.fixture(scope="session")
def plain_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"batch: {{storage_dir: {tmp_path_factory.mktemp('storage')}}}"


@pytest.fixture(scope="module")
def plain_server(start_server, tiny_llama, plain_config, plain_profiles) -> Iterator[Server]:
    """Nothing is configured but a place for batches; the same server for all modules."""
    env = {"CONSERVE_PROFILE_DIR": str(plain_profiles)}
    with start_server(tiny_llama, config=plain_config, env=env) as server:
        yield server
