"""A real Prometheus that scrapes one server once a second."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from conserve_sgl.bench.systems.server import ManagedProcess, free_port
from support.server import until

PROMETHEUS = shutil.which("prometheus")

needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None, reason="no prometheus here: scripts/test_tools.sh installs it"
)


class Prometheus:
    """A context manager that runs it.

    Args:
        url: of the server.
        rules: a file of rules, evaluated once a second.
        folder: an empty one, for its data.
    """

    def __init__(self, url: str, rules: Path, folder: Path) -> None:
        assert PROMETHEUS is not None
        config, port = folder / "prometheus.yml", free_port()
        targets = [{"targets": [url.removeprefix("http://")]}]
        scrape = {"job_name": "conserve", "static_configs": targets}
        settings = {
            "global": {
                "scrape_interval": "1s",
                "scrape_timeout": "1s",
                "evaluation_interval": "1s",
            },
            "rule_files": [str(rules)],
            "scrape_configs": [scrape],
        }
        config.write_text(json.dumps(settings))  # JSON is YAML
        argv = [
            PROMETHEUS,
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        self._process = ManagedProcess(argv, log_path=folder / "prometheus.log")
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def __enter__(self) -> Prometheus:
        self._process.start()
        until(self._is_ready)
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        self._process.stop()

    def _is_ready(self) -> bool:
        assert self._process.returncode is None, self._process.log_path.read_text()
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def numbers(self, expr: str) -> list[float]:
        """What an expression is now, of each series; NaN left out.

        Raises:
            AssertionError: Prometheus does not take the expression.
        """
        answer = self._http.get("/api/v1/query", params={"query": expr}).json()
        assert answer["status"] == "success", f"{expr}: {answer['error']}"
        numbers = [float(one["value"][1]) for one in answer["data"]["result"]]
        return [number for number in numbers if not math.isnan(number)]

    def label_values(self, label: str, selector: str) -> list[str]:
        """The values of a label of the series that `selector` selects."""
        url = f"/api/v1/label/{label}/values"
        return self._http.get(url, params={"match[]": selector}).raise_for_status().json()["data"]

    def rules(self) -> dict[str, dict[str, Any]]:
        """The state of every rule by its name, once all have been evaluated."""
        (group,) = self._http.get("/api/v1/rules").raise_for_status().json()["data"]["groups"]
        return {rule["name"]: rule for rule in group["rules"]}
