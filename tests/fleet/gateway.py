"""SGLang's own gateway, started for a test."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import httpx

from conserve_sgl.bench.systems.server import free_port

READY_S = 60

# Tracing is all that the gateway wants of SGLang, whose import takes ten times as long as its own.
_LAUNCH = """
import sys
sys.modules["sglang"] = None
from sglang_router.launch_router import main
main()
"""


class Gateway:
    """A running `sglang_router` in front of some workers.

    Args:
        urls: of its workers; none where it finds them itself.
        policy: how it chooses among them.
        log: a file for what it says.
        flags: more of its own.
        workers: how many it must find well before this returns; as many as there are urls.
        env: more environment variables.
        port: its own; any that is free without.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *flags: str,
        policy: str = "cache_aware",
        log: Path,
        workers: int | None = None,
        env: Mapping[str, str] = MappingProxyType({}),
        port: int | None = None,
    ) -> None:
        metrics_port = free_port()
        port = port or free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        command = [
            *(sys.executable, "-c", _LAUNCH),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
            *(("--worker-urls", *urls) if urls else ()),
            *("--policy", policy),
            *("--worker-startup-check-interval", "1", "--health-check-interval-secs", "1"),
            *flags,
        ]
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **env}
            )
        self.http = httpx.Client(base_url=self.url, timeout=60)
        try:
            self.wait_for(len(urls) if workers is None else workers)
        except BaseException:
            self.stop()
            raise

    def wait_for(self, workers: int) -> None:
        """Return when so many workers are healthy."""
        until_s = time.monotonic() + READY_S
        while len(self.healthy()) != workers:
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < until_s, self.log.read_text()
            time.sleep(0.05)

    def healthy(self) -> list[str]:
        """The URLs of its workers that are well."""
        try:
            answer = self.http.get("/workers")
        except httpx.TransportError:
            return []
        if answer.status_code != 200:
            return []
        return [one["url"] for one in answer.json()["workers"] if one["is_healthy"]]

    def add(self, url: str) -> None:
        """Let it use one more worker."""
        self.http.post("/workers", json={"url": url}).raise_for_status()

    def stop(self) -> None:
        """End it."""
        self.http.close()
        self._process.terminate()
        self._process.wait()
