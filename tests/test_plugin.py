"""The plugin's entry point: inert without a configuration, all or nothing with one.

What needs SGLang's own loader runs in a process of its own: hooks, once applied, stay.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from conserve_sgl import compat, plugin
from conserve_sgl.config import CONFIG_ENV
from conserve_sgl.profile.steps import STEP_LOG_ENV

CHECKOUT = Path(__file__).resolve().parent.parent
GOOD = CHECKOUT / "configs" / "serve" / "default.yaml"


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch):
    ours = (CONFIG_ENV, STEP_LOG_ENV, compat.ALLOW_UNTESTED_ENV)
    for name in (*ours, "SGLANG_RUST_SERVER", "SGLANG_PLUGINS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def registered(monkeypatch) -> list[object]:
    """What would have been registered, without importing SGLang."""
    calls: list[object] = []
    monkeypatch.setattr(plugin, "_register", calls.append)
    return calls


def refused() -> str:
    """Why `register` ends this process."""
    with pytest.raises(SystemExit) as left:
        plugin.register()
    # A string as its code: Python prints it to stderr and ends with 1.
    assert isinstance(left.value.code, str)
    assert left.value.code.startswith("conserve: refusing to start: ")
    return left.value.code


@pytest.mark.parametrize("value", [None, ""], ids=["not set", "empty"])
def test_without_a_configuration_nothing_is_registered_and_nothing_checked(
    registered, monkeypatch, value
):
    if value is not None:
        monkeypatch.setenv(CONFIG_ENV, value)
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    monkeypatch.setattr(compat, "version", lambda _name: "0.0.1")
    plugin.register()
    assert registered == []


def test_with_a_step_log_alone_there_is_a_meter_and_no_configuration(registered, monkeypatch):
    monkeypatch.setenv(STEP_LOG_ENV, "steps.jsonl")
    plugin.register()
    assert registered == [None]


def test_with_a_configuration_the_hooks_are_registered(registered, monkeypatch):
    monkeypatch.setenv(CONFIG_ENV, str(GOOD))
    plugin.register()
    assert len(registered) == 1


def test_a_bad_configuration_ends_the_process_with_file_line_and_key(
    registered, monkeypatch, tmp_path
):
    bad = tmp_path / "bad.yaml"
    bad.write_text("memory:\n  online_reserve: 25\n")
    monkeypatch.setenv(CONFIG_ENV, str(bad))
    assert f"{bad}:2: memory.online_reserve: must be a number from 0 to 1" in refused()
    assert registered == []


def test_a_configuration_that_is_not_there_ends_the_process(registered, monkeypatch, tmp_path):
    monkeypatch.setenv(CONFIG_ENV, str(tmp_path / "none.yaml"))
    assert "none.yaml: cannot be read" in refused()
    assert registered == []


def test_an_untested_version_ends_the_process(registered, monkeypatch):
    monkeypatch.setenv(CONFIG_ENV, str(GOOD))
    monkeypatch.setattr(compat, "version", lambda _name: "0.5.99")
    assert "SGLang 0.5.99 was not tested" in refused()
    assert registered == []


def test_an_untested_version_may_be_allowed(registered, monkeypatch):
    monkeypatch.setenv(CONFIG_ENV, str(GOOD))
    monkeypatch.setenv(compat.ALLOW_UNTESTED_ENV, "1")
    monkeypatch.setattr(compat, "version", lambda _name: "0.5.99")
    plugin.register()
    assert len(registered) == 1


def test_the_rust_server_ends_the_process(registered, monkeypatch):
    monkeypatch.setenv(CONFIG_ENV, str(GOOD))
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    assert "SGLANG_RUST_SERVER" in refused()
    assert registered == []


# ------------------------------------------------- with SGLang's own loader


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    stdout: str
    stderr: str


def in_a_process(script: str, *arguments: str, **environment: str) -> Ended:
    """Run `script` in a fresh interpreter, SGLang's warnings off."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("SGLANG_", "CONSERVE_"))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**plain, **environment},
    )
    return Ended(done.returncode, done.stdout, done.stderr)


HOOKED = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers import scheduler
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.plugins.hook_registry import HookRegistry
from conserve_sgl.engine.scheduler import ConserveScheduler
from conserve_sgl.plugin import HOOK_TARGETS
assert set(HOOK_TARGETS) <= HookRegistry._patched
assert scheduler.Scheduler is ConserveScheduler
for hooked in (TokenizerManager._init_req_state, TokenizerManager.init_ipc_channels):
    assert hooked.__wrapped__
try:
    Engine._launch_subprocesses(server_args=None)
except AttributeError:
    print("flags were looked at")
"""

STOCK = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.managers import scheduler
from conserve_sgl.plugin import HOOK_TARGETS
assert not HookRegistry._patched & set(HOOK_TARGETS)
assert scheduler.Scheduler.__module__ == "sglang.srt.managers.scheduler"
ours = [m for m in sys.modules if m.startswith(("conserve_sgl.engine", "conserve_sgl.ingress"))]
assert not ours, ours
"""

METERED = """
import sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.managers import scheduler
from conserve_sgl.engine.metered_scheduler import MeteredScheduler
from conserve_sgl.plugin import HOOK_TARGETS
assert HookRegistry._patched & set(HOOK_TARGETS) == {"sglang.srt.managers.scheduler.Scheduler"}
assert scheduler.Scheduler is MeteredScheduler
assert "conserve_sgl.engine.scheduler" not in sys.modules
"""

TARGET_GONE = """
from sglang.srt.managers.tokenizer_manager import TokenizerManager
del TokenizerManager._init_req_state
from sglang.srt.plugins import load_plugins
load_plugins()
print("still running")
"""

REPLACED_BY_ANOTHER = """
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from conserve_sgl import plugin
class Other(Scheduler):
    pass
plugin.register()
HookRegistry.register("sglang.srt.managers.scheduler.Scheduler", Other, HookType.REPLACE)
HookRegistry.apply_hooks()
print("still running")
"""

REFUSED_FLAG = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.server_args import ServerArgs
Engine._launch_subprocesses(ServerArgs(model_path="dummy", pp_size=2), None, None, None)
print("still running")
"""

SCHEDULER_IS_STOCK = """
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.entrypoints import http_server
http_server._setup_and_run_http_server(None, None, None, None, [{"status": "ready"}], None)
print("still running")
"""


# Importing SGLang takes most of a process's time, so the cases are forks of one that has done it.
FORKS = """
import json, os, sys, traceback
import sglang.srt.entrypoints.http_server, sglang.srt.managers.scheduler
folder, config, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
for name, (script, variable) in cases.items():
    if (child := os.fork()) == 0:
        for number, stream in ((1, "stdout"), (2, "stderr")):
            flags = os.O_CREAT | os.O_WRONLY
            os.dup2(os.open(f"{folder}/{name}.{stream}", flags, 0o600), number)
        if variable:
            os.environ[variable] = config
        code = 0
        try:
            exec(script, {})
        except SystemExit as e:
            print(e.code, file=sys.stderr)
            code = 1
        except BaseException:
            traceback.print_exc()
            code = 2
        sys.stdout.flush()
        os._exit(code)
    with open(f"{folder}/{name}.code", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""
CASES = {
    "stock": (STOCK, None),
    "metered": (METERED, STEP_LOG_ENV),
    "target_gone": (TARGET_GONE, CONFIG_ENV),
    "replaced": (REPLACED_BY_ANOTHER, CONFIG_ENV),
    "refused_flag": (REFUSED_FLAG, CONFIG_ENV),
    "stock_scheduler": (SCHEDULER_IS_STOCK, CONFIG_ENV),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, Ended]:
    """How each case's process ended."""
    folder = tmp_path_factory.mktemp("forks")
    done = in_a_process(FORKS, str(folder), str(GOOD), json.dumps(CASES))
    assert done.code == 0, done.stderr

    def read(name: str, what: str) -> str:
        return (folder / f"{name}.{what}").read_text()

    return {
        name: Ended(int(read(name, "code")), read(name, "stdout"), read(name, "stderr"))
        for name in CASES
    }


@pytest.mark.engine
def test_with_a_configuration_every_hook_takes():
    done = in_a_process(HOOKED, CONSERVE_CONFIG=str(GOOD))
    assert done.code == 0, done.stderr
    assert "flags were looked at" in done.stdout


@pytest.mark.engine
def test_a_stock_server_stays_stock(ended):
    assert ended["stock"].code == 0, ended["stock"].stderr


@pytest.mark.engine
def test_a_metered_server_has_another_scheduler_and_is_stock_otherwise(ended):
    assert ended["metered"].code == 0, ended["metered"].stderr


@pytest.mark.engine
@pytest.mark.parametrize(
    ("case", "said"),
    [
        pytest.param("target_gone", "TokenizerManager._init_req_state", id="a target is gone"),
        pytest.param("replaced", "scheduler.Scheduler", id="another plugin was later"),
        pytest.param("refused_flag", "--pp-size=2 does not go with conserve", id="a refused flag"),
        pytest.param("stock_scheduler", "a scheduler's has not", id="a scheduler without hooks"),
    ],
)
def test_a_server_that_would_run_half_hooked_does_not_start(ended, case, said):
    code, stdout, stderr = ended[case]
    assert code == 1, stderr
    assert "still running" not in stdout
    last = stderr.strip().splitlines()[-1]
    assert last.startswith("conserve: refusing to start: ")
    assert said in last
