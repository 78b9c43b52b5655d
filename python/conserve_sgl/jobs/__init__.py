"""Offline jobs from a YAML file: JSONL tasks, sent as offline work, resumable. See docs/jobs.md."""

from conserve_sgl.jobs.job_run import run_job
from conserve_sgl.jobs.schema import Job

__all__ = ["Job", "run_job"]
