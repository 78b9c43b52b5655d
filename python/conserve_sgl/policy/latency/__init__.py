"""How long a step of the engine takes, predicted from what is in it.

work      what a step computes
costs     what that takes: the form of the model, and its coefficients
fit       the costs of a profile, and of the steps observed since
errors    how far predictions were off, the margin for it, and whether they lean to one side
model     `LatencyModel`, which predicts and learns
"""

from conserve_sgl.policy.latency.costs import Coefficients
from conserve_sgl.policy.latency.errors import ErrorQuantiles
from conserve_sgl.policy.latency.model import LatencyModel, prompt_token_s
from conserve_sgl.policy.latency.work import StepKind, StepSample, StepWork

__all__ = [
    "Coefficients",
    "ErrorQuantiles",
    "LatencyModel",
    "StepKind",
    "StepSample",
    "StepWork",
    "prompt_token_s",
]
