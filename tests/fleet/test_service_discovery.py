"""The gateway of deploy/base finds servers by their pods, `conserve run-batch` by the gateway."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from conserve_sgl.client import http as client_http
from fleet.kubernetes import Kubernetes
from fleet.test_run_batch import ALL, TEXTS, answers, job, run, served

pytestmark = pytest.mark.timeout(120)
NAMESPACE = "conserve"
ADDRESSES = ("127.0.0.1", "127.0.0.2")
# What `Gateway` gives itself, and what is slower than a test should be.
_OTHERS = ("--host", "--port", "--prometheus", "--policy", "--health", "--service-discovery-port")


@pytest.fixture
def kubernetes(tmp_path: Path) -> Iterator[Kubernetes]:
    kubernetes = Kubernetes(NAMESPACE, tmp_path / "kubeconfig")
    yield kubernetes
    kubernetes.stop()


def manifest(checkout: Path, file: str, kind: str) -> dict[str, Any]:
    found = yaml.safe_load_all((checkout / "deploy" / "base" / file).read_text())
    return next(one for one in found if one["kind"] == kind)


@pytest.fixture
def start_discovering_gateway(
    start_gateway, checkout: Path, tmp_path: Path
) -> Callable[[int, int], Any]:
    """A gateway with the flags of deploy/base, once it has so many workers at a port."""
    pod = manifest(checkout, "gateway.yaml", "Deployment")["spec"]["template"]["spec"]
    flags = [arg for arg in pod["containers"][0]["args"] if not arg.startswith(_OTHERS)]
    flags = [flag.replace("$(NAMESPACE)", NAMESPACE) for flag in flags]

    def start(port: int, workers: int) -> Any:
        return start_gateway(
            [],
            *flags,
            f"--service-discovery-port={port}",
            workers=workers,
            env={"KUBECONFIG": str(tmp_path / "kubeconfig")},
        )

    return start


def test_lines_go_to_the_pods_that_the_gateway_has_found(
    start_worker, start_discovering_gateway, kubernetes, checkout, tmp_path, monkeypatch
):
    monkeypatch.setattr(client_http, "REDISCOVER_S", 0.2)
    server = manifest(checkout, "servers.yaml", "Deployment")
    labels = server["spec"]["template"]["metadata"]["labels"]
    first = start_worker(host=ADDRESSES[0], row_s=0.03)
    second = start_worker(host=ADDRESSES[1], port=first.port, row_s=0.03)
    for name, address in zip(("first", "second"), ADDRESSES, strict=True):
        kubernetes.add(name, address, labels)
    kubernetes.add("another", "127.0.0.3", {"app.kubernetes.io/name": "another"})
    gateway = start_discovering_gateway(first.port, 2)
    assert sorted(gateway.healthy()) == [first.url, second.url]

    batch = job(tmp_path, TEXTS, discover=gateway.url)
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(run(batch)[0]))
    thread.start()
    while second.offline.total() < 20:
        time.sleep(0.005)
    kubernetes.delete("second")
    gateway.wait_for(1)
    second.stop()
    thread.join()
    assert results == [0]
    assert answers(batch) == ALL
    assert set(served([first, second])) == set(TEXTS)
    assert first.offline.total() > second.offline.total()
