"""Decides: which work runs in a step. No torch, no sglang, no clock of its own."""

from conserve_sgl.policy.bound import Bound
from conserve_sgl.policy.budget import SlackBudget
from conserve_sgl.policy.job_tag import JobTag
from conserve_sgl.policy.latency import Coefficients, LatencyModel, StepWork
from conserve_sgl.policy.offline_queue import Backlog, OfflineItem, OfflineQueue, prefix_key
from conserve_sgl.policy.reserve import OnlineReserve, most_offline_rows
from conserve_sgl.policy.service_class import PriorityRule, ServiceClass
from conserve_sgl.policy.slo import Slo
from conserve_sgl.policy.starvation import Starvation
from conserve_sgl.policy.step import Policy, Prompt, Rows, StepPlan, StepView
from conserve_sgl.policy.yielding import SliceDecision, SliceView, Slicing, YieldMode

__all__ = [
    "Backlog",
    "Bound",
    "Coefficients",
    "JobTag",
    "LatencyModel",
    "OfflineItem",
    "OfflineQueue",
    "OnlineReserve",
    "Policy",
    "PriorityRule",
    "Prompt",
    "Rows",
    "ServiceClass",
    "SlackBudget",
    "SliceDecision",
    "SliceView",
    "Slicing",
    "Slo",
    "Starvation",
    "StepPlan",
    "StepView",
    "StepWork",
    "YieldMode",
    "most_offline_rows",
    "prefix_key",
]
