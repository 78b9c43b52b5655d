"""Decides: which work runs in a step. Pure Python, no torch, no sglang, no clock of its own."""

from conserve_sgl.policy.fixed_cap import FixedCap
from conserve_sgl.policy.offline_queue import OfflineQueue
from conserve_sgl.policy.service_class import PriorityRule, ServiceClass
from conserve_sgl.policy.step import Policy, StepPlan, StepView

__all__ = [
    "FixedCap",
    "OfflineQueue",
    "Policy",
    "PriorityRule",
    "ServiceClass",
    "StepPlan",
    "StepView",
]
