"""Sparsity schedules: which fraction of the weights is zero at which training step.

They are tfmot's ``PruningSchedule``s, for ``tfprune.prune_low_magnitude`` and tfmot's own function
alike. Importing this package imports tfmot (and leaves ``tf.keras`` and the environment alone).
"""

from tfprune.schedules.base import Periodic, PruningSchedule, Schedule
from tfprune.schedules.constant import Constant
from tfprune.schedules.dense_sparse_dense import DenseSparseDense
from tfprune.schedules.fixed import Fixed
from tfprune.schedules.per_epoch import PerEpoch
from tfprune.schedules.ramps import Cosine, Exponential, Linear, OneCycle, Polynomial, Ramp
from tfprune.schedules.serialization import deserialize, serialize
from tfprune.schedules.stepwise import Stepwise
from tfprune.schedules.tfmot import load

ConstantSparsity = load().sparsity.keras.ConstantSparsity
PolynomialDecay = load().sparsity.keras.PolynomialDecay

__all__ = [
    "Constant",
    "ConstantSparsity",
    "Cosine",
    "DenseSparseDense",
    "Exponential",
    "Fixed",
    "Linear",
    "OneCycle",
    "PerEpoch",
    "Periodic",
    "Polynomial",
    "PolynomialDecay",
    "PruningSchedule",
    "Ramp",
    "Schedule",
    "Stepwise",
    "deserialize",
    "serialize",
]
