"""As much of Kubernetes' API as SGLang's gateway finds its workers by: pods, listed and watched."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import StreamingResponse


class Kubernetes:
    """A namespace of pods.

    Args:
        namespace: its name; there are no others.
        kubeconfig: a file that is made, for KUBECONFIG.
    """

    def __init__(self, namespace: str, kubeconfig: Path) -> None:
        self._namespace = namespace
        self._pods: dict[str, dict[str, Any]] = {}
        self._events: list[dict[str, Any]] = []
        app = FastAPI()
        app.add_api_route(f"/api/v1/namespaces/{namespace}/pods", self._list)
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.002)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        context = {"cluster": "here", "user": "gateway", "namespace": namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "users": [{"name": "gateway", "user": {}}],
            "contexts": [{"name": "here", "context": context}],
        }
        kubeconfig.write_text(json.dumps(config))

    def add(self, name: str, ip: str, labels: Mapping[str, str]) -> None:
        """A pod that is ready."""
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": self._namespace, "uid": name, "labels": labels},
            "spec": {"containers": [{"name": "server"}]},
            "status": {
                "phase": "Running",
                "podIP": ip,
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }
        self._pods[name] = pod
        self._event("ADDED", pod)

    def delete(self, name: str) -> None:
        """The pod is to go: it has until the end of its grace period."""
        pod = self._pods[name]
        pod["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        self._event("MODIFIED", pod)

    def stop(self) -> None:
        """End it, and all watches."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    def _event(self, kind: str, pod: dict[str, Any]) -> None:
        pod["metadata"]["resourceVersion"] = str(len(self._events) + 1)
        self._events.append({"type": kind, "object": json.loads(json.dumps(pod))})

    async def _list(self, watch: bool = False, resourceVersion: int = 0) -> Any:
        if watch:
            return StreamingResponse(self._watch(resourceVersion), media_type="application/json")
        version = {"resourceVersion": str(len(self._events))}
        pods = list(self._pods.values())
        return {"apiVersion": "v1", "kind": "PodList", "metadata": version, "items": pods}

    async def _watch(self, seen: int) -> AsyncIterator[str]:
        # Something comes at once: the gateway waits for it.
        bookmark = {"apiVersion": "v1", "kind": "Pod", "metadata": {"resourceVersion": str(seen)}}
        yield json.dumps({"type": "BOOKMARK", "object": bookmark}) + "\n"
        while not self._server.should_exit:
            for event in self._events[seen:]:
                seen += 1
                yield json.dumps(event) + "\n"
            await asyncio.sleep(0.02)
