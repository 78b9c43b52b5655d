"""Real servers for the engine tests, and a small client."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from conserve_sgl.bench.systems.server import ServerProcess, free_port
from support.warm import WarmServerProcess, WarmServers

OFFLINE = {"x-sgl-conserve-class": "offline"}
HICACHE = (
    "--enable-hierarchical-cache",
    "--hicache-write-policy=write_through",
    "--hicache-io-backend=direct",
    "--hicache-mem-layout=layer_first",
)
READY_S = 180
THINKING_S = 0.1  # between two online requests: without it, offline work may wait for their end
TINY_FLAGS = (
    "--dtype=float32",
    "--max-total-tokens=4096",
    "--max-running-requests=16",
    "--chunked-prefill-size=128",
)


# On a GPU the same tests run with kernels whose results do not depend on the batch, in true
# float32: tokens that are computed again are prefilled, not decoded, and in bfloat16 the kernels of
# the two differ by enough to turn a random model to another token.
GPU_FLAGS = (
    "--attention-backend=triton",
    "--sampling-backend=pytorch",
    "--enable-deterministic-inference",
)
GPU_ENV = {"TRITON_F32_DEFAULT": "ieee", "SGLANG_FORCE_FUSED_OP_BACKEND": "torch"}


def on_gpu() -> bool:
    """Whether servers that are started here run on a GPU."""
    import torch  # takes seconds; tests of the fast tier use other parts of this module

    return torch.cuda.is_available()


MODELS = frozenset(
    {
        "deepseek_v2",
        "gemma3_causal",
        "gpt_oss",
        "llama",
        "mellum",
        "mixtral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "qwen3_next",
    }
)
"""Those of SGLang's that the tests use, or that one of these imports."""


def models_unused() -> str:
    """The model files of SGLang that no test uses, as SGLang wants them listed."""
    sglang = find_spec("sglang")
    assert sglang is not None, "scripts/setup.sh installs it"
    files = (Path(sglang.origin).parent / "srt" / "models").glob("*.py")
    return ",".join(sorted({file.stem for file in files} - MODELS))


def until(condition: Callable[[], bool]) -> None:
    """Return when `condition` holds; the test's timeout is the bound."""
    while not condition():
        time.sleep(0.01)


class Server:
    """A running server and what the tests ask of it."""

    def __init__(self, process: ServerProcess) -> None:
        self.process = process
        self.base_url = process.base_url
        # SGLang closes a connection that idles for 5 s, as long as httpx keeps it: what is sent
        # just then is lost.
        limits = httpx.Limits(keepalive_expiry=2)
        self.http = httpx.Client(base_url=self.base_url, timeout=120, limits=limits)

    def generate(self, text: str, *, headers: dict[str, str] | None = None, **body: Any) -> dict:
        """POST /generate, greedy; the answer, which must be 200."""
        sampling = {"temperature": 0, "max_new_tokens": 16, **body.pop("sampling_params", {})}
        body = {"text": text, "sampling_params": sampling, **body}
        response = self.http.post("/generate", json=body, headers=headers)
        response.raise_for_status()
        return response.json()

    def generate_all(self, texts: list[str], at_once: int | None = None, **body: Any) -> list[str]:
        """Generate from all `texts`, all or so many at a time, each its own request; the answers'
        texts."""
        with ThreadPoolExecutor(at_once or len(texts)) as pool:
            answers = pool.map(lambda text: self.generate(text, **body), texts)
            return [answer["text"] for answer in answers]

    def beside_online(self, work: Callable[[], Any], text: str, **body: Any) -> Any:
        """The result of `work`, with online requests for `text` all along, whose answer stays."""
        alone = self.generate(text, **body)["text"]
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            while not future.done():
                time.sleep(THINKING_S)
                assert self.generate(text, **body)["text"] == alone
            return future.result()

    def state(self) -> dict[str, Any]:
        """What the scheduler says of itself under `conserve`."""
        info = self.http.get("/server_info").raise_for_status().json()
        return info["internal_states"][0]["conserve"]

    def capabilities(self) -> dict[str, bool]:
        """Which it has, by their names."""
        return {one["name"]: one["on"] for one in self.state()["capabilities"]}

    def set_internal_state(self, numbers: dict[str, float]) -> bool:
        """Whether the scheduler took `numbers`, as `conserve_sgl.settings` names them."""
        answer = self.http.post("/set_internal_state", json={"server_args": numbers})
        (updated,) = answer.raise_for_status().json()
        return updated

    @contextmanager
    def slow_steps(self, seconds: float) -> Iterator[None]:
        """Within, every step takes at least so long: a test can act in a certain one."""
        try:
            self._slow_down(seconds)
            yield
        finally:
            self._slow_down(None)

    def _slow_down(self, seconds: float | None) -> None:
        body = {"forward_sleep_time": seconds}
        self.http.post("/slow_down", json=body).raise_for_status()

    def offline_accepted(self) -> int:
        """Offline requests accepted since the server started."""
        return self.state()["offline_accepted"]

    def assert_idle_and_balanced(self) -> None:
        """The engine is idle, holds nothing, and SGLang's own checks found no leak."""
        self.http.post("/flush_cache", params={"timeout": 30}).raise_for_status()
        assert self.process.returncode is None, self.process.log_tail()
        log = self.process.log_path.read_text()
        assert "leak" not in log.lower(), self.process.log_tail()

    def is_usable(self) -> bool:
        """Whether tests may go on with it: it runs, and nothing is left in it."""
        try:
            self.assert_idle_and_balanced()
        except (AssertionError, httpx.HTTPError):
            return False
        return True


class Servers:
    """Starts servers, one at a time: two idle engines would keep two cores busy.

    A server stays when its tests are over, for others that ask for the very same; the next one
    that is different ends it.

    Args:
        new_folder: makes an empty folder.
        profiles: where the servers keep their latency profiles.
    """

    def __init__(self, new_folder: Callable[[], Path], profiles: Path) -> None:
        self._new_folder = new_folder
        self._profiles = profiles
        self._stack = ExitStack()
        self._asked: tuple[Any, ...] | None = None
        self._server: Server | None = None
        self._warm = WarmServers()

    @contextmanager
    def start(
        self,
        model: Path,
        *flags: str,
        config: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Iterator[Server]:
        """With `config` (YAML text) it is `conserve serve`, without it a stock SGLang on our
        platform."""
        asked = (model, flags, config, tuple((env or {}).items()))
        if self._server is None or asked != self._asked or not self._server.is_usable():
            self.stop()
            self._server = self._launch(model, flags, config, env or {})
            self._asked = asked
        yield self._server

    def stop(self) -> None:
        """End the server that runs, if one does."""
        self._server = None
        self._stack.close()

    def close(self) -> None:
        """Nothing of it runs any more."""
        self.stop()
        self._warm.stop()

    def _launch(
        self, model: Path, flags: tuple[str, ...], config: str | None, env: Mapping[str, str]
    ) -> Server:
        folder, port = self._new_folder(), free_port()
        env = {
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
            "CONSERVE_PROFILE_DIR": str(self._profiles),
            **env,
        }
        if config is None:
            argv = [sys.executable, "-c", "from sglang.cli.main import main; main()", "serve"]
            if not on_gpu():
                env["SGLANG_PLATFORM"] = "conserve_cpu"
        else:
            path = folder / "conserve.yaml"
            path.write_text(config)
            argv = [sys.executable, "-m", "conserve_sgl.cli", "serve", f"--config={path}", "--"]
        on_device = GPU_FLAGS if on_gpu() else ()
        env.update(GPU_ENV if on_gpu() else {})
        argv += [f"--model-path={model}", f"--port={port}", *TINY_FLAGS, *on_device, *flags]
        how = {"port": port, "log_path": folder / "log", "env": env}
        if on_gpu():  # no process that is forked can use CUDA
            process = ServerProcess(argv, **how)
        else:
            process = WarmServerProcess(self._warm, argv, **how)
        process.stop_signal = signal.SIGINT  # at SIGTERM it looks every 5 s whether it is drained
        self._stack.enter_context(process)
        process.wait_healthy(READY_S)
        server = Server(process)
        self._stack.enter_context(server.http)
        return server
