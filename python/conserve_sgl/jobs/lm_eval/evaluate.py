"""Runs the `lm_eval` part of a job: load the tasks, evaluate, write results in lm-eval's layout."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec
import yaml
from rich.console import Console

from conserve_sgl.client.clock import Clock
from conserve_sgl.client.interrupt import Stopped
from conserve_sgl.errors import ConserveError, InputError, JobError
from conserve_sgl.jobs.lm_eval.online import Snapshot, compare, snapshot
from conserve_sgl.jobs.lm_eval.poster import Poster
from conserve_sgl.jobs.output_folder import OutputFolder
from conserve_sgl.jobs.plan import Plan, expand
from conserve_sgl.jobs.schema import LmEval, ModelArgs
from conserve_sgl.jobs.summary import LmEvalSummary, Metric
from conserve_sgl.json_lines import with_escapes

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

__all__ = ["Evaluation", "LoadedTasks", "load_tasks"]

_DEFAULT_SEEDS = (0, 1234, 1234, 1234)
_SCORING = 2
"""Of answers in the cache. 2: no continuation without tokens; one name for max_gen_toks."""


class LoadedTasks(msgspec.Struct, frozen=True, kw_only=True):
    """lm-eval's tasks with their data, and what made them."""

    tasks: list[Any]
    manager: Any


def load_tasks(path: Path, config: LmEval) -> LoadedTasks:
    """Find the tasks that the job at `path` names, and load their data.

    Raises:
        InputError: lm-eval is not installed, a task is unknown, or its data cannot be had.
    """
    _quiet()
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as e:
        reason = f"needs lm-evaluation-harness ({e}): pip install conserve-sgl[eval]"
        raise InputError(path, reason, key="lm_eval") from e
    manager = TaskManager(
        include_path=_include_path(path, config),
        metadata=_given(config.model_args) | config.metadata,
    )
    with TemporaryDirectory() as scratch:
        names = [
            name
            for i, task in enumerate(config.tasks)
            for name in _names(path, i, task, manager, Path(scratch))
        ]
        try:
            loaded = manager.load(names)
        except Exception as e:  # a task is code and data of someone else's, and fails as it likes
            reason = f"cannot be loaded: {type(e).__name__}: {e}"
            raise InputError(path, reason, key="lm_eval.tasks") from e
    return LoadedTasks(tasks=_top_level(loaded), manager=manager)


class Evaluation:
    """One run of the `lm_eval` part of a plan: `prepare`, then `run`."""

    def __init__(
        self,
        path: Path,
        plan: Plan,
        folder: OutputFolder,
        tasks: LoadedTasks,
        console: Console,
        *,
        api_key: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        assert plan.job.lm_eval is not None
        self._path = path
        self._plan = plan
        self._config = plan.job.lm_eval
        self._tasks = tasks
        self._api_key = api_key
        self._clock = clock or Clock()
        self._started_s = 0.0
        self._online_before: Snapshot | None = None
        self._results: dict[str, Any] | None = None
        self._poster = Poster(
            plan.job,
            name=plan.name,
            console=console,
            api_key=api_key,
            identify=folder.set_model,
            clock=clock,
        )

    def prepare(self, *, fresh: bool) -> None:
        """Ask the server for what `model_args` left open, and load the tokenizer.

        Raises:
            InputError: the server does not say it, there is no such tokenizer, a task asks for
                what cannot be generated, or a folder cannot be made.
            JobError: no endpoint answers.
        """
        from conserve_sgl.jobs.lm_eval.generation import prepared
        from conserve_sgl.jobs.lm_eval.model import ConserveLM

        model, args = asyncio.run(self._model())
        self._gen_kwargs = prepared(self._path, self._tasks.tasks, self._config.gen_kwargs, args)
        try:
            self._lm = ConserveLM(self._poster, self._plan.job, model, args)
        except (OSError, ValueError) as e:
            key = "lm_eval.model_args.tokenizer"
            raise InputError(self._path, f"cannot load {args.tokenizer}: {e}", key=key) from e
        self._model_args = {"model": model} | _given(args)
        self._cache = self._cache_path(model, args)
        self._make_folder("output_path", self._output())
        self._make_folder("use_cache", Path(self._cache).parent)
        if fresh:
            Path(f"{self._cache}_rank0.db").unlink(missing_ok=True)

    def run(self) -> None:
        """Evaluate, or go on with it; `summary` tells whether it came to its end.

        Raises:
            JobError: requests failed, or results cannot be written. What was answered is kept.
        """
        self._started_s = self._clock.monotonic_s()
        self._online_before = self._snapshot()
        try:
            self._results = self._evaluate()
        except Stopped:
            return
        except sqlite3.Error as e:
            raise JobError(f"cannot write the cache {self._cache}_rank0.db: {e}") from e
        except ConserveError:
            raise
        except Exception as e:  # as when tasks are loaded
            where = traceback.extract_tb(e.__traceback__)[-1]
            raise JobError(
                f"lm-eval failed at {where.filename}:{where.lineno}: {type(e).__name__}: {e}. "
                "Finished requests are kept; run the same command again to go on"
            ) from e

    def _snapshot(self) -> Snapshot | None:
        """None too where the servers come and go."""
        endpoints = self._plan.job.endpoints
        return snapshot(endpoints, self._api_key) if endpoints else None

    def summary(self) -> LmEvalSummary:
        """What the run came to, or has so far."""
        now = self._online_before and self._snapshot()
        return LmEvalSummary(
            partial=self._results is None,
            run_s=round(self._clock.monotonic_s() - self._started_s, 3),
            run_requests=self._poster.requests,
            run_retries=self._poster.retries,
            run_prompt_tokens=self._poster.prompt_tokens,
            run_completion_tokens=self._poster.completion_tokens,
            online_latency=compare(self._online_before, now),
            tasks={} if self._results is None else _metrics(self._results),
        )

    async def _model(self) -> tuple[str, ModelArgs]:
        """The model's name, and `model_args` with what the server says filled in."""
        model_info = await self._poster.get("/model_info")
        server_info = await self._poster.get("/server_info")
        model_info = model_info if isinstance(model_info, dict) else {}
        server_info = server_info if isinstance(server_info, dict) else {}
        given = self._config.model_args
        args = msgspec.structs.replace(
            given,
            tokenizer=given.tokenizer or model_info.get("tokenizer_path"),
            max_length=given.max_length or server_info.get("max_req_input_len"),
        )
        for key in ("tokenizer", "max_length"):
            if getattr(args, key) is None:
                reason = "is needed: the endpoints do not say it"
                raise InputError(self._path, reason, key=f"lm_eval.model_args.{key}")
        model = self._plan.job.model or model_info.get("model_path") or args.tokenizer
        return str(model), args

    def _cache_path(self, model: str, args: ModelArgs) -> str:
        # lm-eval's key is the request alone: another model's answers must not be in reach, nor
        # those of a version of ours that scored otherwise.
        of = hashlib.sha256(msgspec.json.encode([_SCORING, model, args])).hexdigest()[:12]
        given = self._config.use_cache
        base = (
            self._plan.output / "lm_eval_cache"
            if given is None
            else expand(self._path, "lm_eval.use_cache", given)
        )
        return f"{base}_{of}"

    def _evaluate(self) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker

        config = self._config
        tracker = EvaluationTracker(output_path=str(self._output()))
        seeds = _seeds(config.seed)
        with _closing_cache(self._lm):
            results = simple_evaluate(
                model=self._lm,
                model_args=self._model_args,
                tasks=self._tasks.tasks,
                task_manager=self._tasks.manager,
                num_fewshot=config.num_fewshot,
                use_cache=self._cache,
                limit=config.limit,
                samples=config.samples,
                bootstrap_iters=config.bootstrap_iters,
                log_samples=config.log_samples,
                evaluation_tracker=tracker,
                system_instruction=config.system_instruction,
                apply_chat_template=config.apply_chat_template,
                fewshot_as_multiturn=_multiturn(config),
                gen_kwargs=self._gen_kwargs or None,
                predict_only=config.predict_only,
                random_seed=seeds[0],
                numpy_random_seed=seeds[1],
                torch_random_seed=seeds[2],
                fewshot_random_seed=seeds[3],
                confirm_run_unsafe_code=config.confirm_run_unsafe_code,
                metadata=self._model_args | config.metadata,
            )
        assert results is not None  # it is None only for ranks above 0
        results["config"]["model"] = "conserve"
        _write(tracker, results)
        return results

    def _make_folder(self, key: str, folder: Path) -> None:
        # Not found out when everything has been answered.
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            reason = f"cannot write {folder}: {e.strerror}"
            raise InputError(self._path, reason, key=f"lm_eval.{key}") from e

    def _output(self) -> Path:
        given = self._config.output_path
        if given is None:
            return self._plan.output
        return Path(expand(self._path, "lm_eval.output_path", given))


def _top_level(loaded: dict[str, Any]) -> list[Any]:
    """The groups that stand in no other group, and the tasks that stand in none."""
    groups, inside = loaded["groups"], set()
    for group in groups.values():
        inside |= {child.name for child in group.get_all_groups()}
        inside |= {child.task_name for child in group.get_all_tasks()}
    top = [group for name, group in groups.items() if name not in inside]
    return top + [task for name, task in loaded["tasks"].items() if name not in inside]


def _quiet() -> None:
    # Both are read when the libraries are first imported.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")


def _include_path(path: Path, config: LmEval) -> str | None:
    if config.include_path is None:
        return None
    folder = (path.parent / expand(path, "lm_eval.include_path", config.include_path)).resolve()
    if not folder.is_dir():
        raise InputError(path, f"no such folder: {folder}", key="lm_eval.include_path")
    return str(folder)


def _names(
    path: Path, i: int, task: str | dict[str, Any], manager: TaskManager, scratch: Path
) -> list[Any]:
    """What lm-eval loads for one entry of `tasks`. May write to the folder `scratch`."""
    key = f"lm_eval.tasks[{i}]"
    if isinstance(task, dict):
        return [_changed(_with_files(path, key, task), manager, scratch / f"{i}.yaml")]
    if task.endswith((".yaml", ".yml")):
        file = path.parent / expand(path, key, task)
        if not file.is_file():
            raise InputError(path, f"no such file: {file}", key=key)
        return [str(file)]
    names = manager.match_tasks([task])
    if not names:
        raise InputError(path, f"lm-eval has no task {task!r}", key=key)
    return names


def _changed(task: dict[str, Any], manager: TaskManager, file: Path) -> str | dict[str, Any]:
    """A task of its own, or a known one with other values: lm-eval's way of that is an include."""
    known = manager.task_index.get(str(task.get("task")))
    if known is None or known.yaml_path is None:
        return task
    file.write_text(yaml.safe_dump({"include": str(known.yaml_path.resolve())} | task))
    return str(file)


def _with_files(path: Path, key: str, task: dict[str, Any]) -> dict[str, Any]:
    """`task`, its `data_files` with ${VARIABLES} filled in, and found from the job's folder."""
    kwargs = task.get("dataset_kwargs")
    if not isinstance(kwargs, dict) or "data_files" not in kwargs:
        return task

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: walk(v) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v) for v in value]
        if "://" in value:
            return value
        named = expand(path, f"{key}.dataset_kwargs.data_files", value)
        local = (path.parent / named).resolve()
        return str(local) if local.is_file() else named  # it may be a pattern

    return task | {"dataset_kwargs": kwargs | {"data_files": walk(kwargs["data_files"])}}


def _given(args: ModelArgs) -> dict[str, Any]:
    return {key: value for key, value in msgspec.to_builtins(args).items() if value is not None}


def _seeds(seed: int | list[int | None] | None) -> list[int | None]:
    if seed is None:
        return list(_DEFAULT_SEEDS)
    return seed if isinstance(seed, list) else [seed] * len(_DEFAULT_SEEDS)


def _multiturn(config: LmEval) -> bool:
    if config.fewshot_as_multiturn is None:
        return bool(config.apply_chat_template)
    return config.fewshot_as_multiturn


@contextmanager
def _closing_cache(lm: Any) -> Iterator[None]:
    try:
        yield
    finally:
        if lm.cache_hook.dbdict is not None:
            lm.cache_hook.dbdict.close()


def _write(tracker: Any, results: dict[str, Any]) -> None:
    """Results, and the samples in `results`, which are taken out of it."""
    samples = results.pop("samples", None)
    # The results of a model in the folder `.cache/x` would be where `ls` does not show them.
    named = tracker.general_config_tracker
    named.model_name_sanitized = str(named.model_name_sanitized).lstrip("._") or "model"
    tracker.save_results_aggregated(results=results, samples=samples)
    for task, lines in (samples or {}).items():
        tracker.save_results_samples(task_name=task, samples=lines)
    # lm-eval only warns when it could not write.
    folder = Path(tracker.output_path) / str(tracker.general_config_tracker.model_name_sanitized)
    missing = (
        [] if list(folder.glob(f"results_{getattr(tracker, 'date_id', '')}.json")) else [folder]
    )
    lines_of = [folder / f"samples_{task}_{tracker.date_id}.jsonl" for task in samples or {}]
    missing += [file for file in lines_of if not file.is_file()]
    if missing:
        raise JobError(f"cannot write the results to {missing[0]}; run the same command again")
    for file in lines_of:
        written = file.read_bytes()
        if (escaped := with_escapes(written)) != written:
            file.write_bytes(escaped)


def _metrics(results: dict[str, Any]) -> dict[str, dict[str, Metric]]:
    """lm-eval's `acc,none` and `acc_stderr,none` as one metric, per task and group."""
    tasks: dict[str, dict[str, Metric]] = {}
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        found = {}
        for key, value in values.items():
            name, comma, filter_ = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = values.get(f"{name}_stderr,{filter_}")
            found[name if filter_ == "none" else key] = Metric(
                value=float(value),  # lm-eval's may be numpy's
                stderr=float(stderr) if isinstance(stderr, int | float) else None,
            )
        tasks[task] = found
    return tasks
