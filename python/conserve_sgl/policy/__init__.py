"""Decides: which work runs in a step. Pure Python, no torch, no sglang, no clock of its own."""

from conserve_sgl.policy.fixed_cap import FixedCap
from conserve_sgl.policy.job_tag import JobTag
from conserve_sgl.policy.offline_queue import Backlog, OfflineItem, OfflineQueue, prefix_key
from conserve_sgl.policy.service_class import PriorityRule, ServiceClass
from conserve_sgl.policy.step import Policy, StepPlan, StepView

__all__ = [
    "Backlog",
    "FixedCap",
    "JobTag",
    "OfflineItem",
    "OfflineQueue",
    "Policy",
    "PriorityRule",
    "ServiceClass",
    "StepPlan",
    "StepView",
    "prefix_key",
]
