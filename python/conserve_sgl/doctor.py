"""`conserve doctor`: what is installed, which hooks take, what conflicts, and a verdict.

It downloads nothing: a model that is on no disk here is said to be so.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
import re
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from enum import Enum
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.markup import escape

from conserve_sgl import __version__, compat
from conserve_sgl.config import CONFIG_ENV, BatchConfig, ConserveConfig
from conserve_sgl.emulation import Emulation
from conserve_sgl.engine.capabilities import Host, decide
from conserve_sgl.errors import ConserveError, HookError
from conserve_sgl.profile.store import model_path

__all__ = ["Finding", "Level", "examine", "host_cache"]

_LOW_HOST_GIB = 8
# SGLang's: what HiCache leaves free beside its pool, its default size over the device pool, and
# about what it makes of an unset --mem-fraction-static.
_HICACHE_RESERVE_GIB = 10
_DEFAULT_HICACHE_RATIO = 2.0
_USUAL_MEM_FRACTION = 0.88
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


class Level(Enum):
    """How a finding bears on the verdict."""

    OK = "[green]ok[/]  "
    NOTE = "[yellow]note[/]"
    BAD = "[red]bad[/] "


class Finding(msgspec.Struct, frozen=True):
    """One row of the report."""

    what: str
    level: Level
    detail: str


def examine(console: Console, *, config: Path | None, flags: Sequence[str]) -> int:
    """Print the report to `console`, each finding as soon as it is known.

    What is found without SGLang comes first: to import SGLang takes a quarter of a minute, and is
    left out when a server would not start anyway.

    Args:
        config: the configuration to check, or None for the defaults.
        flags: SGLang flags to check for conflicts.

    Returns:
        The exit code: 0 when nothing is bad, else 1.
    """
    console.print(f"conserve {__version__}", highlight=False)
    bad: list[str] = []
    unchecked: list[str] = []

    def report(*parts: Iterable[Finding]) -> None:
        for finding in itertools.chain(*parts):
            # Not a table: a name that is cut or broken cannot be searched for.
            what, detail = escape(f"{finding.what:<14}"), escape(finding.detail)
            line = f"{finding.level.value} {what} {detail}"
            console.print(line, highlight=False, soft_wrap=True)
            if finding.level is Level.BAD:
                bad.append(finding.what)
            elif finding.what == "model" and finding.level is Level.NOTE:
                unchecked.append(finding.detail)

    report(_packages(), _environment(), _configuration(config), _model_folder(flags))
    if not bad:
        with console.status("Loading SGLang as a server does"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what this machine is without, a line for each
            report(_flags(flags, config), _hooks(config), _machine())
    if bad:
        names = ", ".join(dict.fromkeys(bad))
        console.print(f"[red]A server would not start as configured:[/] {names}", soft_wrap=True)
        return 1
    if not flags:
        console.print("[green]conserve would be in every process of a server.[/]")
        console.print("With -- SGLANG FLAGS, --model-path among them, the server is checked too.")
        return 0
    once = ", once it has the model" if unchecked else ""
    console.print(f"[green]A server would start{once}, with conserve in every process.[/]")
    return 0


def _packages() -> Iterator[Finding]:
    yield Finding("python", Level.OK, sys.version.split()[0])
    found = compat.sglang_version()
    try:
        compat.check_version(found)
        tested = found in compat.TESTED_VERSIONS
        detail = f"{found}" if tested else f"{found}, not tested ({compat.ALLOW_UNTESTED_ENV}=1)"
        yield Finding("sglang", Level.OK if tested else Level.NOTE, detail)
    except ConserveError as e:
        yield Finding("sglang", Level.BAD, str(e))
    try:
        yield Finding("torch", Level.OK, version("torch"))
    except PackageNotFoundError:
        yield Finding("torch", Level.BAD, "not installed")
    for group in ("sglang.srt.plugins", "sglang.srt.platforms"):
        ours = [ep for ep in entry_points(group=group) if ep.value.startswith("conserve_sgl.")]
        missing = "reinstall conserve-sgl with pip"
        found = f"{ours[0].name} in {group}" if ours else f"none in {group}: {missing}"
        yield Finding("entry point", Level.OK if ours else Level.BAD, found)
    if sys.dont_write_bytecode and not _is_compiled("sglang"):
        detail = (
            "PYTHONDONTWRITEBYTECODE is set and SGLang has none: each process of a server compiles "
            "all that it imports again, half a minute; `python -m compileall` on the site-packages "
            "folder helps for good"
        )
        yield Finding("bytecode", Level.NOTE, detail)


def _is_compiled(package: str) -> bool:
    """Whether Python finds bytecode of the package's own file; false where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return False
    return Path(importlib.util.cache_from_source(spec.origin)).exists()


def _environment() -> Iterator[Finding]:
    try:
        compat.check_environment(os.environ)
    except ConserveError as e:
        yield Finding("environment", Level.BAD, str(e))
    allowed = os.environ.get("SGLANG_PLUGINS")
    if allowed and "conserve" not in [name.strip() for name in allowed.split(",")]:
        yield Finding("SGLANG_PLUGINS", Level.BAD, f"{allowed!r} leaves conserve out")


def _configuration(config: Path | None) -> Iterator[Finding]:
    if config is None:
        yield Finding("configuration", Level.NOTE, f"none given (${CONFIG_ENV}); using defaults")
        return
    try:
        folder = ConserveConfig.load(config).batch.storage_dir
        yield Finding("configuration", Level.OK, str(config))
    except ConserveError as e:
        yield Finding("configuration", Level.BAD, str(e))
        return
    if folder is not None:
        yield _storage(Path(folder).absolute())


def _storage(folder: Path) -> Finding:
    """Whether a server could make and write the folder; nothing is made, it may be for others."""
    place = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if place.is_dir() and os.access(place, os.W_OK | os.X_OK):
        return Finding("batches", Level.OK, str(folder))
    return Finding("batches", Level.BAD, f"{folder}: {place} is no folder that can be written")


def _model_folder(flags: Sequence[str]) -> Iterator[Finding]:
    """What is wrong with the model as far as that is seen without SGLang."""
    model = model_path(flags)
    if model is not None and _is_missing_path(model):
        yield Finding("model", Level.BAD, f"{model}: no such file or folder")


@contextmanager
def _configured(config: Path | None) -> Iterator[None]:
    """Within, the environment names a configuration that can be read."""
    before = os.environ.get(CONFIG_ENV)
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as defaults:
        os.environ[CONFIG_ENV] = str(config or defaults.name)
        try:
            yield
        finally:
            os.environ.pop(CONFIG_ENV)
            if before is not None:
                os.environ[CONFIG_ENV] = before


def _hooks(config: Path | None) -> Iterator[Finding]:
    """Load every plugin as a server's process does, and look what is in place."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.plugins.hook_registry import HookRegistry

    from conserve_sgl.plugin import HOOK_TARGETS, verify

    with _configured(config):
        try:
            load_plugins()
            # A plugin that SGLang passed over has registered nothing, and says nothing.
            verify()
        except SystemExit as e:
            yield Finding("hooks", Level.BAD, str(e.code))
            return
        except HookError as e:
            yield Finding("hooks", Level.BAD, str(e))
            return
    for target in HOOK_TARGETS:
        others = {
            source.plugin_name
            for _, _, source in HookRegistry._hooks[target]
            if source is not None and source.plugin_name != "conserve"
        }
        shared = f", also hooked by {', '.join(sorted(others))}" if others else ""
        level = Level.NOTE if others else Level.OK
        yield Finding("hook", level, target.removeprefix("sglang.srt.") + shared)


def _is_missing_path(name: str) -> bool:
    """Whether a name of a model is one of a folder, by its looks, and there is none."""
    return name.startswith(("/", ".", "~")) and not os.path.exists(name)


def _flags(flags: Sequence[str], config: Path | None = None) -> Iterator[Finding]:
    if not flags:
        return
    from sglang.srt.server_args import prepare_server_args

    said = io.StringIO()
    try:
        # It also sets up logging, onto the stream that it finds.
        with redirect_stdout(said), redirect_stderr(said):
            args = prepare_server_args(list(flags))
    except (SystemExit, Exception) as e:
        yield Finding("flags", Level.BAD, f"SGLang does not accept them: {_why(e, said)}")
        return
    found = [*compat.conflicts(args), *_of_workers(args, config)]
    for conflict in found:
        yield Finding("flags", Level.BAD, conflict)
    if not found:
        yield Finding("flags", Level.OK, " ".join(flags))
    loaded = ConserveConfig() if config is None else ConserveConfig.load(config)
    yield from _model(args, loaded)
    yield from _port(args)
    if args.enable_hierarchical_cache:
        yield host_cache(args, free_gib=_free_host_gib(), device_gib=_device_gib())


def _of_workers(args: Any, config: Path | None) -> Iterator[str]:
    """What keeps several tokenizer workers from starting."""
    batch = BatchConfig() if config is None else ConserveConfig.load(config).batch
    try:
        compat.check_workers(
            args.tokenizer_worker_num, os.environ, has_batches=batch.storage_dir is not None
        )
    except ConserveError as e:
        yield str(e)


def _why(error: BaseException, said: io.StringIO) -> str:
    """What SGLang's parser of flags said, without the hundreds of lines that list all flags."""
    _, found, reason = said.getvalue().rpartition("error: ")
    if isinstance(error, SystemExit) and found:
        return reason.strip()
    if isinstance(error, SystemExit):
        return "with these it prints something and ends"
    return str(error) or type(error).__name__


def _model(args: Any, config: ConserveConfig) -> Iterator[Finding]:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.mem_cache.kv_cache_builder import uses_ssm_state

    model = args.model_path
    try:
        with _quietly(), _no_downloads():
            found = ModelConfig.from_server_args(args)
            has_states = uses_ssm_state(found)
            refused = _why_refused(found, args, has_states=has_states)
    except Exception as e:
        is_missing = isinstance(e, OSError) and not os.path.exists(model)
        if is_missing and _HUB_NAME.fullmatch(model):
            yield Finding("model", Level.NOTE, f"{model} is not on this machine: not checked")
            yield from _capabilities(args, config)
        else:
            yield Finding("model", Level.BAD, f"{model}: {_why(e, io.StringIO())}")
        return
    if _is_missing_path(args.tokenizer_path or ""):
        yield Finding("tokenizer", Level.BAD, f"{args.tokenizer_path}: no such file or folder")
    kind = ", ".join(found.hf_config.architectures or ["of no known kind"])
    if refused is not None:
        detail = f"{kind}: {refused} are not supported by conserve"
        yield Finding("model", Level.BAD, detail)
    elif os.path.isdir(model) and args.load_format == "auto" and not _has_weights(Path(model)):
        yield Finding("model", Level.BAD, f"{model}: has no weights")
    else:
        yield from _model_class(found, args, config, f"{model}: {kind}", has_states=has_states)


def _why_refused(model: Any, args: Any, *, has_states: bool) -> str | None:
    if has_states and args.speculative_algorithm is not None:
        return "drafts (--speculative-algorithm) beside state-space layers"
    if model.is_hybrid_swa and model.full_attention_layer_ids == []:
        return "sliding windows in all layers"
    return None


def _model_class(
    model: Any, args: Any, config: ConserveConfig, name: str, *, has_states: bool
) -> Iterator[Finding]:
    """The class that SGLang serves a model by (its ModelConfig), and what it can and cannot."""
    from sglang.srt.model_loader.utils import get_model_architecture

    try:
        with _quietly(), _no_downloads():
            model_class, _ = get_model_architecture(model)
    except Exception as e:
        yield Finding("model", Level.BAD, f"{name}: {_why(e, io.StringIO())}")
        return
    yield Finding("model", Level.OK, name)
    yield from _capabilities(
        args, config, model_class, has_states=has_states, has_windows=model.is_hybrid_swa
    )


def _capabilities(
    args: Any,
    config: ConserveConfig,
    model_class: type | None = None,
    *,
    has_states: bool = False,
    has_windows: bool = False,
) -> Iterator[Finding]:
    """What the server would log of itself at start; without a model nothing of slices."""
    from sglang.srt.environ import envs

    host = Host.of_flags(
        model_class or object,
        args,
        has_states=has_states,
        has_windows=has_windows,
        drops_windows=envs.SGLANG_OPT_RELEASE_PREFILL_SWA.get(),
    )
    capabilities = decide(host, config)
    for capability in capabilities.all:
        if model_class is not None or capability is not capabilities.slices:
            level = Level.OK if capability.on else Level.NOTE
            yield Finding(capability.name, level, str(capability))


def _has_weights(folder: Path) -> bool:
    return any(file.suffix in _WEIGHTS for file in folder.iterdir())


@contextmanager
def _quietly() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


@contextmanager
def _no_downloads() -> Iterator[None]:
    """Within, a model is looked up on this machine alone."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _port(args: Any) -> Iterator[Finding]:
    try:
        with socket.create_server((args.host, args.port)):
            pass
    except OSError as e:
        reason = os.strerror(e.errno) if (e.errno or 0) > 0 else str(e)  # below 0: of a host's name
        detail = f"{args.host}:{args.port} cannot be had now: {reason}"
        yield Finding("port", Level.NOTE, detail)


def host_cache(args: Any, *, free_gib: float, device_gib: float | None) -> Finding:
    """Whether the host has the memory that HiCache will take.

    Args:
        args: SGLang's ServerArgs, with a hierarchical cache.
        free_gib: host memory that is free now.
        device_gib: memory of one accelerator; None on a machine without one.
    """

    def note(detail: str) -> Finding:
        return Finding("host cache", Level.NOTE, detail)

    if args.hicache_size:
        asked_gib = args.hicache_size * 1e9 / 2**30
    elif device_gib is not None:
        # What SGLang may use of the device is the most that its KV pool can be.
        share = args.mem_fraction_static or _USUAL_MEM_FRACTION
        asked_gib = (args.hicache_ratio or _DEFAULT_HICACHE_RATIO) * share * device_gib
    else:
        return Finding("host cache", Level.OK, "a multiple of the KV pool (--hicache-ratio)")
    asked_gib *= args.tp_size
    spare_gib = free_gib - (0 if device_gib is None else _HICACHE_RESERVE_GIB)
    detail = f"takes up to {asked_gib:.0f} GiB of {max(spare_gib, 0):.0f} GiB that are to spare"
    if asked_gib > spare_gib:
        return note(f"{detail}: lower --hicache-size or --hicache-ratio")
    return Finding("host cache", Level.OK, detail)


def _device_gib() -> float | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / 2**30


def _free_host_gib() -> float:
    import psutil

    return psutil.virtual_memory().available / 2**30


def _machine() -> Iterator[Finding]:
    import psutil
    import torch

    if (emulated := Emulation.from_environment()) is not None:
        detail = f"{emulated.device}, emulated: no figure is this machine's"
        yield Finding("device", Level.NOTE, detail)
    elif torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield Finding("device", Level.OK, f"{torch.cuda.get_device_name(0)}, {gib:.0f} GiB")
    else:
        yield Finding("device", Level.OK, "no accelerator: conserve's CPU platform is used")
    memory = psutil.virtual_memory()
    free_gib, total_gib = memory.available / 2**30, memory.total / 2**30
    detail = f"{free_gib:.0f} of {total_gib:.0f} GiB free"
    low = free_gib < _LOW_HOST_GIB
    yield Finding("host memory", Level.NOTE if low else Level.OK, detail)
