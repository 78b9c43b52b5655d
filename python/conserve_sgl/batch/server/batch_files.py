"""The files of a batch: its input, and its results up to the day when they are shown.

All of it waits for the disk: it is called in threads (`disk.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from conserve_sgl.batch.results import Results, finished_lines
from conserve_sgl.batch.schema import BatchRecord, FileObject, RequestCounts, Usage, failed_line
from conserve_sgl.batch.server.store import Store
from conserve_sgl.batch.validate import InputRefused, Limits, Plan, read_plan, read_request
from conserve_sgl.config import BatchConfig

__all__ = ["BatchFiles"]

logger = logging.getLogger(__name__)

_EXPIRED = "This request could not be executed before the completion window expired."


class BatchFiles:
    """The files of the batches of one store. Every method may raise OSError or JobError."""

    def __init__(self, store: Store, config: BatchConfig) -> None:
        self._store = store
        self._retention_s = int(config.retention_hours * 3600)
        self._limits = Limits(max_requests=config.max_requests)
        self._max_deaths = config.max_deaths

    def input(self, record: BatchRecord) -> Path:
        """Where the input is."""
        return self._store.content(record.batch.input_file_id)

    def plan(
        self,
        record: BatchRecord,
        done: Collection[str],
        apart: Collection[str] = (),
        breathe: Callable[[], None] = lambda: None,
    ) -> Plan:
        """What of the input is to be sent; see `read_plan`. Raises InputRefused."""
        endpoint = record.batch.endpoint
        return read_plan(
            self.input(record), endpoint, self._limits, done=done, apart=apart, breathe=breathe
        )

    def results(self, record: BatchRecord) -> Results:
        """The result files, to go on with."""
        output, errors = (self._store.content(i) for i in (record.output_id, record.error_id))
        return Results(output, errors, record.batch.request_counts.total)

    def give_up(self, results: Results, deaths: Mapping[str, int]) -> None:
        """The lines that were in flight at too many deaths have failed."""
        for custom_id, times in deaths.items():
            if times >= self._max_deaths and custom_id not in results.done:
                message = f"the server died {times} time{'s'[: times > 1]} while it ran"
                results.add(failed_line(custom_id, "server_died", message))

    def collect(self, record: BatchRecord) -> tuple[RequestCounts, Usage]:
        """Count the results, after an expired batch's missing lines were added, and sync them."""
        results = self.results(record)
        try:
            if record.ending == "expired":
                self._add_expired(record, results)
            results.sync()
        finally:
            results.close()
        return results.counts, results.usage

    def shown(self, record: BatchRecord, now: int) -> list[FileObject]:
        """The result files that hold anything, as they are shown; the other one is removed."""
        files = []
        expires_at = now + (record.output_expires_s or self._retention_s)
        for file_id, what in ((record.output_id, "output"), (record.error_id, "error")):
            path = self._store.content(file_id)
            size_bytes = path.stat().st_size
            if size_bytes == 0:
                path.unlink()
                continue
            file = FileObject(
                id=file_id,
                bytes=size_bytes,
                created_at=now,
                filename=f"{record.batch.id}_{what}.jsonl",
                purpose="batch_output",
                expires_at=expires_at,
            )
            files.append(file)
        return files

    def recounted(self, record: BatchRecord) -> BatchRecord:
        """With the counts of its result files: those in the store are of some seconds before the
        last server ended, and the files are opened only when the batch has its turn."""
        if record.batch.status == "validating":
            return record
        try:
            completed, failed = (
                finished_lines(self._store.content(i)) for i in (record.output_id, record.error_id)
            )
        except OSError as e:  # it will be met again where it matters
            logger.error("%s: its lines cannot be counted: %s", record.batch.id, e)
            return record
        total = record.batch.request_counts.total
        counts = RequestCounts(total=total, completed=completed, failed=failed)
        return record.with_batch(request_counts=counts)

    def _add_expired(self, record: BatchRecord, results: Results) -> None:
        try:
            plan = self.plan(record, results.done)
            with self.input(record).open("rb") as source:
                for where in plan:
                    line = read_request(source.fileno(), *where)
                    results.add(failed_line(line.custom_id, "batch_expired", _EXPIRED))
        except (InputRefused, OSError) as e:
            logger.error("%s: its expired lines cannot be told: %s", record.batch.id, e)
