"""Search: which widths, found by measuring candidates on validation data."""

from tfprune.search.analysis import GroupSensitivity, SensitivityAnalysis
from tfprune.search.eagle_eye import Candidate, EagleEyeResult, eagle_eye
from tfprune.search.measuring import Metric
from tfprune.search.netadapt import NetAdaptResult, Proposal, Step, netadapt
from tfprune.search.retraining import Retraining
from tfprune.search.sensitivity import sensitivity_analysis

__all__ = [
    "Candidate",
    "EagleEyeResult",
    "GroupSensitivity",
    "Metric",
    "NetAdaptResult",
    "Proposal",
    "Retraining",
    "SensitivityAnalysis",
    "Step",
    "eagle_eye",
    "netadapt",
    "sensitivity_analysis",
]
