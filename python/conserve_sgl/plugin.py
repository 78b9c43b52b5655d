"""The entry point `conserve` in `sglang.srt.plugins`; the only file that names hook targets.

SGLang calls `register()` in every process it starts, then applies the hooks, and logs and
swallows whatever goes wrong on the way. A server that runs half hooked would look well and serve
badly, so this plugin checks itself right after the hooks are applied and ends the process with
the reason when anything is amiss.

Without `CONSERVE_CONFIG` in the environment it does nothing at all, unless `CONSERVE_STEP_LOG` asks
for a record of every step: then SGLang's scheduler is metered, and nothing else changed.
"""

from __future__ import annotations

import asyncio
import functools
import os
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from conserve_sgl import compat
from conserve_sgl.batch.server.storage import make_storage
from conserve_sgl.config import CONFIG_ENV, BatchConfig, ConserveConfig, StatusConfig
from conserve_sgl.errors import ConserveError, HookError
from conserve_sgl.profile.steps import STEP_LOG_ENV
from conserve_sgl.settings import OfflineWork, batches_held, offline_number
from conserve_sgl.status.record import BatchLine

__all__ = ["HOOK_TARGETS", "register", "verify"]

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_LAUNCH = "sglang.srt.entrypoints.engine.Engine._launch_subprocesses"
_RUN_HTTP = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"
_INIT_IPC = "sglang.srt.managers.tokenizer_manager.TokenizerManager.init_ipc_channels"
_SET_STATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager.set_internal_state"
_SIGTERM = "sglang.srt.managers.tokenizer_manager.SignalHandler.sigterm_handler"
_INIT_STATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager._init_req_state"
_SAMPLES = "sglang.srt.managers.io_struct.GenerateReqInput._handle_parallel_sampling"
_CREATE = "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object"

HOOK_TARGETS = (
    _SCHEDULER,
    _LAUNCH,
    _RUN_HTTP,
    _INIT_IPC,
    _INIT_STATE,
    _SAMPLES,
    _CREATE,
    _SET_STATE,
    _SIGTERM,
)
"""Every place in SGLang that this plugin hooks, in the order of registration."""


class _Hook(msgspec.Struct, frozen=True):
    target: str
    function: Callable[..., Any]
    kind: str
    """A member name of SGLang's HookType."""


def register() -> None:
    """Register the hooks of this process, to be verified as soon as SGLang has applied them.

    Exits the process, with the reason on stderr, when the configuration cannot be used or this
    SGLang is not one that conserve was tested with.
    """
    if not (os.environ.get(CONFIG_ENV) or os.environ.get(STEP_LOG_ENV)):
        return
    try:
        compat.check_version(compat.sglang_version())
        compat.check_environment(os.environ)
        _register(ConserveConfig.from_environment())
    except ConserveError as e:
        _refuse_to_start(e)


def _register(config: ConserveConfig | None) -> None:
    """The hooks of a server with this configuration; None only meters stock SGLang."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if config is None:
        hooks = [_meter()]
    else:
        hooks = _hooks(config)
        _prefer_online_prefixes()
    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType[hook.kind])
    apply_hooks = HookRegistry.apply_hooks

    @functools.wraps(apply_hooks)
    def apply_and_verify() -> None:
        apply_hooks()
        try:
            verify(hooks)
        except HookError as e:
            _refuse_to_start(e)

    HookRegistry.apply_hooks = apply_and_verify


def _meter() -> _Hook:
    from conserve_sgl.engine.metered_scheduler import MeteredScheduler

    return _Hook(_SCHEDULER, MeteredScheduler, "REPLACE")


def _hooks(config: ConserveConfig) -> list[_Hook]:
    from sglang.srt.managers.utils import is_health_check_generate_req

    from conserve_sgl.engine.scheduler import ConserveScheduler
    from conserve_sgl.ingress.hooks import Ingress

    ingress = Ingress(config, is_health_check_generate_req)
    batches = _Batches(config.batch)
    around_app = functools.partial(_around_app, config.status, ingress, batches)
    return [
        _Hook(_SCHEDULER, ConserveScheduler, "REPLACE"),
        _Hook(_LAUNCH, functools.partial(_before_launch, config.batch), "BEFORE"),
        _Hook(_RUN_HTTP, around_app, "BEFORE"),
        _Hook(_INIT_IPC, ingress.after_init_ipc_channels, "AFTER"),
        _Hook(_INIT_STATE, ingress.before_init_req_state, "BEFORE"),
        _Hook(_SAMPLES, ingress.after_handle_parallel_sampling, "AFTER"),
        _Hook(_CREATE, ingress.around_create_tokenized_object, "AROUND"),
        _Hook(_SET_STATE, batches.around_set_internal_state, "AROUND"),
        _Hook(_SIGTERM, batches.after_sigterm, "AFTER"),
        _Hook(_SIGTERM, _after_sigterm, "AFTER"),
    ]


def _prefer_online_prefixes() -> None:
    """Let the radix cache evict offline KV first, where the operator chose no eviction policy.

    SGLang's `priority` policy evicts low values first. Where low values are the urgent ones it
    would evict online KV first, so there the cache stays as it is.
    """
    from sglang.srt.arg_groups.overrides import declare_resolution, resolving_view
    from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook

    @register_resolution_hook("handle_cache_compatibility")
    def prefer_online(server_args: Any, previous: Callable[[Any], None]) -> None:
        args = resolving_view(server_args)
        default = args.radix_eviction_policy == "lru"
        default &= not args._radix_eviction_policy_explicitly_set
        if default and not args.schedule_low_priority_values_first:
            declare_resolution(server_args, "conserve", radix_eviction_policy="priority")
        previous(server_args)


def _before_launch(batch: BatchConfig, *args: Any, **kwargs: Any) -> None:
    server_args = kwargs["server_args"] if "server_args" in kwargs else args[1]
    try:
        compat.check_flags(server_args)
        if batch.storage_dir is not None:
            make_storage(Path(batch.storage_dir))  # before minutes are spent on loading a model
    except ConserveError as e:
        _refuse_to_start(e)


def _around_app(
    status: StatusConfig,
    ingress: Any,
    batches: _Batches,
    server_args: Any,
    tokenizer_manager: Any,
    _template_manager: Any,
    _port_args: Any,
    scheduler_infos: Sequence[Mapping[str, Any]],
    *_args: Any,
    **_kwargs: Any,
) -> None:
    from sglang.srt.entrypoints.http_server import app

    if not all(info.get("conserve") for info in scheduler_infos):
        _refuse_to_start(
            HookError(
                "this process has the hooks, and a scheduler's has not: it was started while the "
                "package was being installed, or SGLANG_PLUGINS differs between them"
            )
        )
    ingress.before_run_http_server(app)
    batches.serve(app, server_args, tokenizer_manager)
    if status.enabled:
        from conserve_sgl.ingress.status import add_status_route

        ask = functools.partial(_ask_scheduler, tokenizer_manager)
        add_status_route(app, ask, batches.open)


async def _ask_scheduler(manager: Any, rid: str) -> dict[str, Any]:
    from sglang.srt.managers.io_struct import GetInternalStateReq

    manager.auto_create_handle_loop()
    (answer,) = await manager.get_internal_state_communicator(GetInternalStateReq(rid=rid))
    return answer.internal_state


class _Batches:
    """The batches of the HTTP process, and the hooks that reach them: none without a folder."""

    def __init__(self, config: BatchConfig) -> None:
        self._config = config
        self._server: Any = None

    def serve(self, app: Any, server_args: Any, tokenizer_manager: Any) -> None:
        if self._config.storage_dir is None:
            return
        from conserve_sgl.batch.server.batch_server import BatchServer

        try:
            self._server = BatchServer(
                app,
                self._config,
                api_key=server_args.api_key,
                is_draining=lambda: tokenizer_manager.gracefully_exit,
                serves_embeddings=not tokenizer_manager.is_generation,
            )
        except ConserveError as e:
            _refuse_to_start(e)

    async def open(self) -> list[BatchLine]:
        """Those that have not ended."""
        return [] if self._server is None else await self._server.open_batches()

    async def around_set_internal_state(
        self, change: Callable[..., Any], manager: Any, asked: Any
    ) -> list[bool]:
        """AROUND `TokenizerManager.set_internal_state`: once the scheduler has taken it."""
        updated = await change(manager, asked)
        if self._server is not None and all(updated):
            held = batches_held(asked.server_args)
            if held is not None:
                self._server.hold(held)
        return updated

    def after_sigterm(self, _result: None, *_args: Any, **_kwargs: Any) -> None:
        """AFTER `SignalHandler.sigterm_handler`, at once: SGLang may end in a moment."""
        if self._server is not None:
            self._server.leave()


def _after_sigterm(_result: None, handler: Any, *_args: Any, **_kwargs: Any) -> None:
    """SGLang ends when no request is left: those that may take hours are answered 503 now."""
    from sglang.srt.managers.io_struct import SetInternalStateReq

    manager = handler.tokenizer_manager
    ends = SetInternalStateReq(server_args=offline_number(OfflineWork.ENDS))
    manager.asyncio_tasks.add(asyncio.ensure_future(manager.set_internal_state(ends)))


def verify(hooks: Sequence[_Hook] | None = None) -> None:
    """Check that every one of `hooks` is in place in this process; None: those of a server with
    the configuration that the environment names.

    Raises:
        HookError: naming each target whose hook did not take.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry

    if hooks is None:
        hooks = _hooks(ConserveConfig.from_environment() or ConserveConfig())
    missing = [
        hook.target
        for hook in hooks
        if hook.target not in HookRegistry._patched or not _is_in_place(hook)
    ]
    if missing:
        raise HookError(
            f"hooks into SGLang that did not take in process {os.getpid()}: {', '.join(missing)}; "
            "SGLang's log above has the error, or another plugin replaced the same target"
        )


def _is_in_place(hook: _Hook) -> bool:
    """A class that another plugin replaced later is not."""
    if hook.kind != "REPLACE":
        return True
    module, _, name = hook.target.rpartition(".")
    return issubclass(pkgutil.resolve_name(f"{module}:{name}"), hook.function)


def _refuse_to_start(error: ConserveError) -> NoReturn:
    # SystemExit, because SGLang swallows every Exception of a plugin.
    sys.exit(f"conserve: refusing to start: {error}")
