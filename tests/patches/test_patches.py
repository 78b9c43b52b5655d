from __future__ import annotations
import __future__ as future

import ast
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

PATCHES = sorted((Path(__file__).parents[2] / "patches").glob("*.patch"))
FIELDS = ("Subject", "Applies-to", "What", "Why", "Upstream", "Drop-when")
TARGET = re.compile(r"^\+\+\+ b/(\S+)$", re.MULTILINE)

each_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
needs_sglang = pytest.mark.skipif(
    importlib.util.find_spec("sglang") is None, reason="sglang is not installed"
)


def header(patch: Path) -> dict[str, str]:
    text = patch.read_text().split("\n--- a/")[0]
    parts = re.split(r"^([A-Z][\w-]+): ", text, flags=re.MULTILINE)[1:]
    return {
        name: " ".join(body.split()) for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def targets(*patches: Path) -> set[str]:
    return {name for patch in patches for name in TARGET.findall(patch.read_text())}


def copy_installed(root: Path, *patches: Path) -> Path:
    """The files that ``patches`` touch, as installed, under ``root``; sglang is not imported."""
    site = Path(importlib.util.find_spec("sglang").origin).parents[1]
    for name in targets(*patches):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(site / name, root / name)
    return root


def apply(root: Path, patch: Path) -> None:
    subprocess.run(
        ["patch", "-p1", "--fuzz=0", "--no-backup-if-mismatch", "-i", patch], cwd=root, check=True
    )


def patched(root: Path, number: str) -> Path:
    apply(copy_installed(root, numbered(number)), numbered(number))
    return root / "sglang"


def numbered(number: str) -> Path:
    (patch,) = (p for p in PATCHES if p.name.startswith(number))
    return patch


def definition(path: Path, name: str, scope: dict[str, Any]) -> Any:
    """One top-level function or class of a file, alone in ``scope``; nothing is imported."""
    run([top_level(path, name)], path, scope)
    return scope[name]


def method(path: Path, owner: str, name: str, scope: dict[str, Any]) -> Any:
    """One method of a class of a file, as a plain function whose globals are ``scope``."""
    (node,) = (n for n in top_level(path, owner).body if getattr(n, "name", None) == name)
    local: dict[str, Any] = {}
    run([node], path, scope, local)
    return local[name]


def top_level(path: Path, name: str) -> Any:
    (node,) = (n for n in ast.parse(path.read_text()).body if getattr(n, "name", None) == name)
    return node


def run(
    body: list[ast.stmt], path: Path, scope: dict[str, Any], local: dict[str, Any] | None = None
) -> None:
    code = ast.Module(body=body, type_ignores=[])
    flags = future.annotations.compiler_flag
    exec(compile(code, str(path), "exec", flags=flags, dont_inherit=True), scope, local)


@each_patch
def test_a_patch_says_what_why_and_when_to_drop_it(patch: Path) -> None:
    fields = header(patch)

    assert tuple(fields) == FIELDS
    assert all(fields.values())
    assert "none known" in fields["Upstream"] or "https://github.com/" in fields["Upstream"]


@each_patch
def test_the_readme_lists_the_patch(patch: Path) -> None:
    assert f"| `{patch.name[:4]}` |" in (patch.parent / "README.md").read_text()


@needs_sglang
@each_patch
def test_a_patch_is_for_the_installed_version(patch: Path) -> None:
    assert header(patch)["Applies-to"] == f"sglang {importlib.metadata.version('sglang')}"


@needs_sglang
@each_patch
def test_a_patch_applies_and_compiles(patch: Path, tmp_path: Path) -> None:
    apply(copy_installed(tmp_path, patch), patch)

    for name in targets(patch):
        compile((tmp_path / name).read_text(), name, "exec")


@needs_sglang
@pytest.mark.parametrize("order", [PATCHES, PATCHES[::-1]], ids=["forwards", "backwards"])
def test_the_patches_apply_together(order: list[Path], tmp_path: Path) -> None:
    copy_installed(tmp_path, *order)
    for patch in order:
        apply(tmp_path, patch)

    for name in targets(*order):
        compile((tmp_path / name).read_text(), name, "exec")


class FakeServer:
    """Answers what RuntimeEndpoint asks, and keeps the bodies posted to /generate."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []

    def __call__(self, url: str, json: dict | None = None, **_: Any) -> FakeResponse:
        if url.endswith("/generate"):
            self.bodies.append(json)
            return FakeResponse(answer(json))
        return FakeResponse({"model_path": "tiny"})


def answer(body: dict[str, Any]) -> Any:
    logprobs = [[-1.0, 5, "x"], [-2.0, 6, "y"]]
    one = {
        "text": "ok",
        "meta_info": {
            "prompt_tokens": 3,
            "input_token_logprobs": logprobs,
            "output_token_logprobs": [],
        },
    }
    inputs = body.get("text", body.get("input_ids"))
    return [one] * len(inputs) if isinstance(inputs, list) else one


class FakeResponse:
    status_code = 200

    def __init__(self, value: Any) -> None:
        self.value = value

    def json(self) -> Any:
        return self.value

    def iter_lines(self, decode_unicode: bool) -> Iterator[bytes]:
        assert decode_unicode is False
        yield b"data: " + json.dumps(self.value).encode()
        yield b"data: [DONE]"


@pytest.fixture
def runtime_endpoint(tmp_path: Path) -> tuple[type, FakeServer]:
    server = FakeServer()
    scope = {
        "BaseBackend": type("BaseBackend", (), {}),
        "http_request": server,
        "json": json,
        "get_chat_template_by_model_path": str,
        "compute_normalized_prompt_logprobs": len,
        "global_config": SimpleNamespace(
            skip_special_tokens_in_output=True, spaces_between_special_tokens_in_out=True
        ),
    }
    path = patched(tmp_path, "0002") / "lang/backend/runtime_endpoint.py"
    return definition(path, "RuntimeEndpoint", scope), server


def use_every_route(endpoint: Any) -> None:
    program = SimpleNamespace(text_="a prompt", images_=[])
    sampling = SimpleNamespace(dtype=None, to_srt_kwargs=lambda: {"max_new_tokens": 4})
    endpoint.cache_prefix("a prefix")
    endpoint.commit_lazy_operations(program)
    endpoint.fill_image(program)
    assert endpoint.generate(program, sampling)[0] == "ok"
    assert [text for text, _ in endpoint.generate_stream(program, sampling)] == ["ok"]
    assert endpoint.select(program, ["a", "b"], 0.0, FirstChoice()) == "a"


class FirstChoice:
    requires_unconditional_logprobs = True

    def __call__(self, choices: list[str], **_: Any) -> str:
        return choices[0]


@needs_sglang
def test_0002_every_request_carries_the_extra_fields(
    runtime_endpoint: tuple[type, FakeServer],
) -> None:
    endpoint_class, server = runtime_endpoint
    extra = {"priority": -100, "sampling_params": "the endpoint's own win"}

    use_every_route(endpoint_class("http://server", extra_request_body=extra))

    assert len(server.bodies) == 8
    assert {body["priority"] for body in server.bodies} == {-100}
    assert all("max_new_tokens" in body["sampling_params"] for body in server.bodies)


@needs_sglang
def test_0002_requests_are_as_before_without_extra_fields(
    runtime_endpoint: tuple[type, FakeServer],
) -> None:
    endpoint_class, server = runtime_endpoint

    use_every_route(endpoint_class("http://server"))

    assert not any("priority" in body for body in server.bodies)


class FakeTree:
    def __init__(self, mamba: bool) -> None:
        self.mamba = mamba

    def supports_mamba(self) -> bool:
        return self.mamba


@needs_sglang
@pytest.mark.parametrize(
    ("asked", "mamba", "kept"),
    [
        ({}, False, False),
        ({"checkpoint": False}, False, False),
        ({"checkpoint": True}, False, True),
        ({"checkpoint": True}, True, False),
    ],
)
def test_0003_the_tree_keeps_kv_only_when_asked_and_able(
    tmp_path: Path, asked: dict[str, bool], mamba: bool, kept: bool
) -> None:
    released: list[bool] = []
    path = patched(tmp_path, "0003") / "srt/managers/schedule_batch.py"
    scope = {
        "get_disagg": lambda: SimpleNamespace(disaggregation_mode="null"),
        "release_kv_cache": lambda _req, _tree, *, checkpoint: released.append(checkpoint),
        "evict_from_tree_cache": lambda _tree, _tokens: None,
        "envs": SimpleNamespace(SGLANG_RETRACT_DECODE_STEPS=SimpleNamespace(get=lambda: 20)),
    }
    definition(path, "release_req", scope)
    batch = SimpleNamespace(
        reqs=[SimpleNamespace(reset_for_retract=lambda: None)],
        req_to_token_pool=None,
        token_to_kv_pool_allocator=None,
        tree_cache=FakeTree(mamba),
        hisparse_coordinator=None,
    )

    assert method(path, "ScheduleBatch", "release_req", scope)(batch, 0, 1, **asked) is True

    assert released == [kept]


class FakeRunner:
    def __init__(self) -> None:
        self.reinit: list[bool] = []

    def forward(self, _batch: Any, *, reinit_attn_backend: bool, split_forward_count: int) -> Any:
        assert split_forward_count == 5
        self.reinit.append(reinit_attn_backend)
        return SimpleNamespace(
            logits_output=None, can_run_graph=False, expert_distribution_metrics=None
        )


@needs_sglang
def test_0004_a_resumed_slice_plans_attention_and_waits_for_its_own_loads(tmp_path: Path) -> None:
    scope = {"GenerationBatchResult": SimpleNamespace}
    path = patched(tmp_path, "0004") / "srt/managers/tp_worker.py"
    forward = method(path, "TpModelWorker", "forward_batch_split_prefill", scope)
    consumers: list[int] = []
    worker = SimpleNamespace(
        model_runner=FakeRunner(),
        set_hicache_consumer=consumers.append,
        _maybe_finalize_elastic_cuda_graph_scale=lambda: None,
    )
    batch = SimpleNamespace(
        split_index=5, split_forward_count=5, split_forward_batch=None, hicache_consumer_index=2
    )

    forward(worker, batch)
    forward(worker, batch, reinit_attn_backend=True)

    assert worker.model_runner.reinit == [False, True]
    assert consumers == [2, 2]


BROKEN = {
    "import": "import no_such_module",
    "entry point": "def register(): raise RuntimeError('no such module')",
    "hook": """
def register():
    from sglang.srt.plugins.hook_registry import HookRegistry
    HookRegistry.register("no_such_module.function", lambda result: result)
""",
}


def load_plugins(root: Path, plugin: str, strict: str, then: str = "") -> tuple[int, str]:
    """Exit status and log of a process that loads one plugin, from the patched files alone."""
    for package in ("sglang", "sglang/srt"):
        (root / package / "__init__.py").touch()
    (root / "broken.py").write_text(plugin)
    (root / "broken-1.dist-info").mkdir()
    (root / "broken-1.dist-info/METADATA").write_text("Name: broken\nVersion: 1\n")
    (root / "broken-1.dist-info/entry_points.txt").write_text(
        "[sglang.srt.plugins]\nbroken = broken:register\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"from sglang.srt.plugins import *; load_plugins(); {then}"],
        env=os.environ
        | {
            "PYTHONPATH": str(root),
            "SGLANG_PLUGINS": "broken",
            "SGLANG_PLUGINS_STRICT": strict,
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@needs_sglang
@pytest.mark.parametrize("what", BROKEN)
def test_0005_a_broken_plugin_is_fatal_only_when_strict(tmp_path: Path, what: str) -> None:
    patched(tmp_path / "strict", "0005")
    patched(tmp_path / "lenient", "0005")

    strict, log = load_plugins(tmp_path / "strict", BROKEN[what], "1")
    lenient, lenient_log = load_plugins(tmp_path / "lenient", BROKEN[what], "0")

    assert (strict, lenient) == (1, 0)
    assert "Failed to" in log
    assert "no such module" in log.replace("_", " ")
    assert "Failed to" in lenient_log


@needs_sglang
def test_0006_the_registry_names_the_targets_that_are_not_in_place(tmp_path: Path) -> None:
    plugin = """
def register():
    from sglang.srt.plugins.hook_registry import HookRegistry
    HookRegistry.register("no_such_module.function", lambda result: result)
    HookRegistry.register("textwrap.dedent", lambda result, text: result)
"""
    copy_installed(tmp_path, numbered("0005"))
    apply(tmp_path, numbered("0006"))

    status, output = load_plugins(
        tmp_path, plugin, "0", then="print(HookRegistry.unapplied_targets())"
    )

    assert status == 0
    assert "['no_such_module.function']" in output
