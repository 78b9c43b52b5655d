"""The record of the server at this moment, for people; see `status/record.py`."""

from __future__ import annotations

import os
import platform
import time
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from conserve_sgl import __version__
from conserve_sgl.engine.host import sglang_version
from conserve_sgl.engine.step_recorder import StepRecorder
from conserve_sgl.policy import SlackBudget, most_offline_rows
from conserve_sgl.settings import OfflineWork
from conserve_sgl.status.ask import Answer, Ask
from conserve_sgl.status.latency import WINDOW_S, LatencyWindow, OnlineLatencies, unseen
from conserve_sgl.status.record import (
    Events,
    Job,
    Kv,
    Latency,
    Offline,
    Online,
    Server,
    Settings,
    Snapshot,
    StepModel,
)
from conserve_sgl.status.why import why

if TYPE_CHECKING:
    from conserve_sgl.engine.accounts import Accounts
    from conserve_sgl.engine.intake import Intake
    from conserve_sgl.engine.live_settings import LiveSettings
    from conserve_sgl.engine.memory import KvMemory

__all__ = ["Status"]

_MOST_JOBS = 50
_OFFLINE = {OfflineWork.RUNS: "run", OfflineWork.PAUSED: "pause", OfflineWork.ENDS: "end"}


class _Host(Protocol):
    """What of SGLang's scheduler is looked at."""

    server_args: Any
    max_running_requests: int
    chunked_prefill_size: int


class Status:
    """Makes the record, when it is asked for.

    Args:
        host: SGLang's scheduler.
        accounts: with most of it.
        intake: the offline queue, and the inbox.
        live: the settings of now.
        budget: knows the objectives as times.
        memory: the KV pool.
        recorder: of the steps, or None.
        latencies: of online requests, or None.
    """

    def __init__(
        self,
        host: _Host,
        *,
        accounts: Accounts,
        intake: Intake,
        live: LiveSettings,
        budget: SlackBudget,
        memory: KvMemory,
        recorder: StepRecorder | None,
        latencies: OnlineLatencies | None,
    ) -> None:
        self._accounts = accounts
        self._intake = intake
        self._live = live
        self._budget = budget
        self._memory = memory
        self._recorder = recorder
        self._latencies = latencies
        self._server = Server(
            model=str(host.server_args.served_model_name),
            conserve=__version__,
            sglang=sglang_version,
            host=platform.node(),
            pid=os.getpid(),
            started_at_s=time.time(),
            rows=host.max_running_requests,
            offline_rows=most_offline_rows(host.max_running_requests),
            chunk_tokens=host.chunked_prefill_size,
        )

    def answer(self, ask: Ask) -> dict[str, Any]:
        """What `ask` asks for, an `Answer`, as plain values."""
        snapshot = msgspec.json.encode(self.snapshot(self._accounts.state()))
        answer = Answer(snapshot=snapshot)
        if self._recorder is not None:
            first, steps = self._recorder.ring.read(ask.since, ask.most)
            answer = Answer(snapshot=snapshot, first=first, steps=steps, epoch_s=_epoch_s())
        return msgspec.structs.asdict(answer)

    def builtins(self, state: dict[str, Any]) -> dict[str, Any]:
        """The record without steps, as plain values; `state` as for `snapshot`."""
        return msgspec.to_builtins(self.snapshot(state))

    def snapshot(self, state: dict[str, Any]) -> Snapshot:
        """The record, without steps.

        Args:
            state: of the accounts, of this moment.
        """
        now_s = time.monotonic()
        settings, online = self._settings(), self._online(now_s, state)
        offline, kv = _offline(state), self._kv()
        model = StepModel(bias=state["latency"]["bias"], is_biased=state["latency"]["is_biased"])
        bounds = self._accounts.bounds
        jobs = self._intake.queue.jobs(self._intake.ledger.expected_tokens_per_s)
        epoch_s, ring = _epoch_s(), self._recorder and self._recorder.ring
        return Snapshot(
            at_s=now_s + epoch_s,
            server=self._server,
            settings=settings,
            why=why(
                bounds.longest(now_s),
                bounds.recent(now_s),
                server=self._server,
                settings=settings,
                online=online,
                offline=offline,
                kv=kv,
                model=model,
            ),
            online=online,
            offline=offline,
            jobs=tuple(_job(job, now_s, epoch_s) for job in jobs[:_MOST_JOBS]),
            more_jobs=max(len(jobs) - _MOST_JOBS, 0),
            kv=kv,
            events=_events(state),
            model=model,
            capabilities=self._live.capabilities.all,
            next_step=0 if ring is None else ring.ended_steps,
            has_steps=ring is not None,
        )

    def _settings(self) -> Settings:
        now, config = self._live.now, self._live.config
        return Settings(
            ttft=now.slo.ttft,
            tpot=now.slo.tpot,
            longest_gap=now.slo.longest_gap,
            yield_ms=now.slo.yield_ms,
            offline=_OFFLINE[now.offline],
            batches="hold" if now.batches_held else "run",
            min_share=config.offline.min_share,
        )

    def _online(self, now_s: float, state: dict[str, Any]) -> Online:
        view, objectives_s = self._accounts.view, self._budget.objectives_s
        seen = self._latencies

        def latency(window: LatencyWindow | None, objective: str) -> Latency:
            if window is None:
                return unseen(objectives_s[objective])
            return window.read(now_s, objectives_s[objective])

        return Online(
            rows=view.online_decoding.count,
            waiting=len(view.online_prompts),
            arriving=self._intake.arriving,
            arrivals=state["arrivals_received"],
            window_s=WINDOW_S,
            ttft=latency(seen and seen.ttft, "ttft"),
            tpot=latency(seen and seen.tpot, "tpot"),
            itl=latency(seen and seen.itl, "longest_gap"),
            margins=state["margins"],
        )

    def _kv(self) -> Kv:
        return self._memory.pools(self._intake.queue.taken, self._accounts.reserved_tokens)


def _epoch_s() -> float:
    """The time of day at which the monotonic clock was 0."""
    return time.time() - time.monotonic()


def _offline(state: dict[str, Any]) -> Offline:
    return Offline(
        rows=state["offline_running"],
        parked=state["offline_parked"],
        waiting=state["offline_waiting"],
        waiting_tokens=state["offline_waiting_tokens"],
        oldest_wait_s=state["offline_oldest_wait_s"],
        at_risk=state["offline_at_risk"],
        starved_s=state["offline_starved_s"],
        tokens_per_s=state["offline_tokens_per_s"],
        alone_tokens_per_s=state["offline_alone_tokens_per_s"],
        tokens=state["offline_tokens"],
        accepted=state["offline_accepted"],
        refused=state["offline_refused"],
        finished=state["offline_finished"],
        aborted=state["offline_aborted"],
        deadline_missed=state["offline_deadline_missed"],
    )


def _events(state: dict[str, Any]) -> Events:
    checkpoint = state["checkpoint"]
    return Events(
        preemptions=state["offline_preempted"],
        rows_parked=state["offline_rows_parked"],
        chunks_parked=state["offline_chunks_parked"],
        yields=state["slices"]["suspensions"],
        checkpointed_tokens=checkpoint["checkpointed_tokens"],
        restored_tokens=checkpoint["restored_tokens"],
        recomputed_tokens=checkpoint["recomputed_tokens"],
        host_full=checkpoint["host_full"],
    )


def _job(job: Any, now_s: float, epoch_s: float) -> Job:
    return Job(
        name=job.job,
        waiting=job.waiting,
        running=job.running,
        finished=job.finished,
        waiting_tokens=job.waiting_tokens,
        deadline_at_s=None if job.deadline_s is None else job.deadline_s + epoch_s,
        done_at_s=None if job.done_in_s is None else now_s + job.done_in_s + epoch_s,
    )
