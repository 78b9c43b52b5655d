"""The queue by job, and when each will be done at the rate of now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from conserve_sgl.policy.offline_queue.lane import Lane

__all__ = ["JobBacklog", "job_backlogs"]

_LEFT_SHARE = 0.5
"""Of what a request that runs was expected to take, what is left on average."""


class JobBacklog(msgspec.Struct, frozen=True, kw_only=True):
    """The requests of one job that are here.

    Args:
        job: its name, "" for all that have none.
        waiting, running: requests.
        finished: requests that are done since the job was last without any here.
        waiting_tokens: that the waiting are expected to take.
        deadline_s: the earliest of their deadlines, or None.
        done_in_s: seconds until all of them are done; None where the rate is not known.
    """

    job: str
    waiting: int
    running: int
    finished: int
    waiting_tokens: int
    deadline_s: float | None
    done_in_s: float | None


def job_backlogs(
    lanes: Iterable[Lane], tokens_per_s: float | None, no_deadline_share: float
) -> list[JobBacklog]:
    """Every job of `lanes`, those that are done first first.

    Args:
        lanes: in which something waits or is out.
        tokens_per_s: tokens as the queue expects them that are served a second, or None.
        no_deadline_share: of the service while both wait, that of lanes without a deadline.
    """
    lanes = list(lanes)
    done_in_s = dict(zip(lanes, _done_in_s(lanes, tokens_per_s, no_deadline_share), strict=True))
    by_job: dict[str, list[Lane]] = {}
    for lane in lanes:
        by_job.setdefault(lane.key[0], []).append(lane)
    jobs = [_job(job, own, [done_in_s[lane] for lane in own]) for job, own in by_job.items()]
    return sorted(jobs, key=lambda job: (job.done_in_s is None, job.done_in_s or 0.0, job.job))


def _job(job: str, lanes: list[Lane], done_in_s: list[float | None]) -> JobBacklog:
    deadlines = [lane.deadline_s for lane in lanes if lane.deadline_s is not None]
    known = [seconds for seconds in done_in_s if seconds is not None]
    return JobBacklog(
        job=job,
        waiting=sum(lane.waiting for lane in lanes),
        running=sum(lane.out for lane in lanes),
        finished=sum(lane.finished for lane in lanes),
        waiting_tokens=sum(lane.waiting_tokens for lane in lanes),
        deadline_s=min(deadlines, default=None),
        done_in_s=max(known) if len(known) == len(lanes) else None,
    )


def _done_in_s(
    lanes: Sequence[Lane], tokens_per_s: float | None, no_deadline_share: float
) -> list[float | None]:
    """Seconds until each lane is done, as a fluid: lanes with a deadline one after the other, the
    earliest first; those without one beside them with their share, and evenly among each other."""
    if not tokens_per_s:
        return [None] * len(lanes)
    left = [lane.waiting_tokens + _LEFT_SHARE * lane.out_tokens for lane in lanes]
    dated = [i for i, lane in enumerate(lanes) if lane.deadline_s is not None]
    undated = [i for i, lane in enumerate(lanes) if lane.deadline_s is None]
    done_in_s: list[float | None] = [None] * len(lanes)
    share = no_deadline_share if dated and undated else 0.0
    both_s = _both_s(sum(left[i] for i in dated), sum(left[i] for i in undated), share)
    both_s /= tokens_per_s
    ahead = 0.0
    for i in sorted(dated, key=lambda i: lanes[i].deadline_s or 0.0):
        ahead += left[i]
        done_in_s[i] = _served_after_s(ahead, (1 - share) * tokens_per_s, both_s, tokens_per_s)
    wait_s = 0.0 if share else ahead / tokens_per_s
    smaller = 0.0
    for rank, i in enumerate(sorted(undated, key=left.__getitem__)):
        # Each got as much as this one takes in all, or all that it wanted.
        tokens = smaller + left[i] * (len(undated) - rank)
        smaller += left[i]
        served_s = _served_after_s(tokens, share * tokens_per_s, both_s, tokens_per_s)
        done_in_s[i] = wait_s + served_s
    return done_in_s


def _both_s(dated: float, undated: float, share: float) -> float:
    """How long both kinds are served side by side, in seconds of one token each."""
    if not share:
        return 0.0
    return min(undated / share, dated / (1 - share) if share < 1 else undated)


def _served_after_s(tokens: float, rate: float, until_s: float, then_rate: float) -> float:
    """Seconds until `tokens` are served at `rate`, and from `until_s` on at another one."""
    if tokens <= rate * until_s:
        return tokens / rate if rate else 0.0
    return until_s + (tokens - rate * until_s) / then_rate
