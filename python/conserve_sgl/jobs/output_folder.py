"""The output folder: what is finished, safely on disk, and owned by one run at a time.

    <output>/job.json             which tasks and data the results belong to
    <output>/<task>.jsonl         one line per finished input line, in order of finishing
    <output>/<task>.errors.jsonl  one line per input line that failed in the latest run
    <output>/summary.json         written when a run ends
    <output>/.lock                held while a run writes here

A line is written in one append and cut off again if the append fails half-way, so a file holds
whole lines but for a last one torn by a crash, which the next run drops. A line is sent again if
and only if its id is not in `<task>.jsonl`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from conserve_sgl.client.append_file import AppendFile, cannot_write
from conserve_sgl.errors import JobError
from conserve_sgl.jobs.plan import Plan, PlannedTask
from conserve_sgl.jobs.records import Failure, Record

__all__ = ["JobFile", "OutputFolder"]


class Fingerprint(msgspec.Struct, frozen=True, kw_only=True):
    definition: str
    data_sha256: str


class JobFile(msgspec.Struct, frozen=True, kw_only=True):
    """`job.json`. `model` is what the endpoints said they serve, None if they did not say."""

    version: int = 1
    name: str = ""
    model: str | None = None
    tasks: dict[str, Fingerprint] = {}


class OutputFolder:
    """The open output folder of one run; a context manager.

    Args:
        plan: says which tasks there are.
        fresh: throw away the results of these tasks first.

    Raises:
        JobError: another run holds the folder, it holds results of something else, or it cannot
            be written.
    """

    def __init__(self, plan: Plan, *, fresh: bool = False) -> None:
        self.folder = plan.output
        self._plan = plan
        self._files: dict[str, AppendFile] = {}
        self._errors: dict[str, AppendFile] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder / ".lock")
        except OSError as e:
            raise _cannot_open(self.folder, e) from e
        try:
            self._open(fresh)
        except BaseException as e:
            self.close()
            if isinstance(e, OSError):
                raise _cannot_open(self.folder, e) from e
            raise

    def _open(self, fresh: bool) -> None:
        self.job_file = self._read_job_file()
        self._refuse_foreign_files()
        if fresh:
            self._forget()
        self._refuse_other_job()
        fingerprints = {t.task.name: _fingerprint(t) for t in self._plan.tasks}
        self._write_job_file(
            msgspec.structs.replace(
                self.job_file,
                name=self._plan.name,
                tasks=self.job_file.tasks | fingerprints,
            )
        )
        for planned in self._plan.tasks:
            self._errors_path(planned.task.name).unlink(missing_ok=True)

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def finished(self, planned: PlannedTask, visit: Callable[[Record], None]) -> set[str]:
        """The ids of the task's lines that are done, after `visit` saw the record of each.

        Called once for each task, before `add`. Drops a torn last line. Records of lines that
        are not in the plan (a lower `limit`) stay in the file and are not visited.

        Raises:
            JobError: the file cannot be written, or was damaged other than by a torn last line.
        """
        path = self._path(planned.task.name)
        done: set[str] = set()
        try:
            path.touch()
            for record in _whole_lines(path):
                if record.id in done:
                    raise JobError(f"{path}: id {record.id!r} is there twice; {_START_ANEW}")
                if record.id in planned.ids:
                    done.add(record.id)
                    visit(record)
            self._files[planned.task.name] = AppendFile(path)
        except OSError as e:
            raise _cannot_open(path, e) from e
        return done

    def set_model(self, model: str) -> None:
        """Note which model the results come from.

        Raises:
            JobError: results from another model are in the folder.
        """
        if self.job_file.model is None:
            job_file = msgspec.structs.replace(self.job_file, model=model)
            try:
                self._write_job_file(job_file)
            except OSError as e:
                raise cannot_write(self.folder, e) from e
        elif self.job_file.model != model:
            raise JobError(
                f"{self.folder} has results of the model {self.job_file.model}, and the endpoints "
                f"serve {model}; {_START_ANEW}"
            )

    def add(self, task: str, record: Record) -> None:
        """Append a finished line."""
        self._files[task].append(record)

    def add_failure(self, task: str, failure: Failure) -> None:
        """Append a failed line to the task's error file, which is made by the first one."""
        path = self._errors_path(task)
        if task not in self._errors:
            try:
                self._errors[task] = AppendFile(path)
            except OSError as e:
                raise cannot_write(path, e) from e
        self._errors[task].append(failure)

    def sync(self) -> None:
        """Make all lines added so far survive a power cut. May be called from another thread."""
        for file in [*self._files.values(), *self._errors.values()]:
            try:
                file.sync()
            except OSError as e:
                raise cannot_write(file.path, e) from e

    def write_summary(self, summary: msgspec.Struct) -> None:
        """Replace `summary.json`."""
        text = msgspec.json.format(msgspec.json.encode(summary), indent=2)
        path = self.folder / "summary.json"
        try:
            _replace(path, text)
        except OSError as e:
            raise cannot_write(path, e) from e

    def close(self) -> None:
        """Sync and close all files and let go of the folder."""
        for file in [*self._files.values(), *self._errors.values()]:
            with suppress(OSError):
                file.close()
        os.close(self._lock)

    def _path(self, task: str) -> Path:
        return self.folder / f"{task}.jsonl"

    def _errors_path(self, task: str) -> Path:
        return self.folder / f"{task}.errors.jsonl"

    def _read_job_file(self) -> JobFile:
        path = self.folder / "job.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=JobFile)
        except FileNotFoundError:
            return JobFile()
        except msgspec.DecodeError as e:
            raise JobError(f"{path} is not a job's: {e}; choose another output folder") from e

    def _write_job_file(self, job_file: JobFile) -> None:
        text = msgspec.json.format(msgspec.json.encode(job_file), indent=2)
        _replace(self.folder / "job.json", text)
        self.job_file = job_file

    def _refuse_foreign_files(self) -> None:
        for planned in self._plan.tasks:
            path = self._path(planned.task.name)
            if planned.task.name not in self.job_file.tasks and path.exists():
                raise JobError(f"{path} is there, and no job made it; choose another output folder")

    def _forget(self) -> None:
        names = [planned.task.name for planned in self._plan.tasks]
        for name in names:
            self._path(name).unlink(missing_ok=True)
            self._errors_path(name).unlink(missing_ok=True)
        (self.folder / "summary.json").unlink(missing_ok=True)
        left = {k: v for k, v in self.job_file.tasks.items() if k not in names}
        model = self.job_file.model if left else None
        self.job_file = JobFile(name=self._plan.name, model=model, tasks=left)

    def _refuse_other_job(self) -> None:
        for planned in self._plan.tasks:
            name, now = planned.task.name, _fingerprint(planned)
            before = self.job_file.tasks.get(name, now)
            if before.data_sha256 != now.data_sha256:
                raise JobError(
                    f"{self._path(name)} was made from other data than {planned.data} holds now; "
                    f"{_START_ANEW}"
                )
            if before.definition != now.definition:
                raise JobError(
                    f"{self._path(name)} was made by another definition of the task {name} "
                    f"(prompt, sampling, score, id, vars or model); {_START_ANEW}"
                )


_START_ANEW = "use --fresh to throw the old results away, or another output folder"


def _fingerprint(planned: PlannedTask) -> Fingerprint:
    return Fingerprint(definition=planned.definition, data_sha256=planned.data_sha256)


def _lock(path: Path) -> int:
    # The lock goes with the process, so a crash leaves none behind; the file itself stays.
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "?"
        os.close(fd)
        raise JobError(f"another run (process {holder}) is writing to {path.parent}") from e
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _whole_lines(path: Path):
    """The records in `path`, which is cut before a torn last line."""
    size_bytes = path.stat().st_size
    with path.open("r+b") as file:
        start = 0
        for number, raw in enumerate(file, 1):
            end = start + len(raw)
            try:
                if not raw.endswith(b"\n"):
                    raise msgspec.DecodeError("no end of line")
                record = msgspec.json.decode(raw, type=Record)
            except (msgspec.DecodeError, UnicodeDecodeError) as e:
                if end != size_bytes:
                    raise JobError(f"{path}:{number}: damaged ({e}); {_START_ANEW}") from e
                file.truncate(start)
                return
            yield record
            start = end


def _replace(path: Path, text: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(text + b"\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _cannot_open(path: Path, e: OSError) -> JobError:
    return JobError(f"cannot write {e.filename or path}: {e.strerror or e}. Nothing was sent")
