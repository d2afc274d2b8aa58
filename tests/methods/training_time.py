"""The training-time methods, small enough for the network ``residual`` of models.py."""

from __future__ import annotations

from tests.methods.models import stripes
from tfprune import methods

METHODS = {
    "slimming": lambda: methods.NetworkSlimming(0.01, macs=0.5),
    "sfp": lambda: methods.SoftFilterPruning(macs=0.5, at_start=False),
    "ista": lambda: methods.ISTA(0.01, macs=0.5),
    "gdp": lambda: methods.GlobalDynamicPruning(
        stripes(32), macs=0.5, every=3, batches=2, batch_size=16
    ),
}
"""Name -> how to make the method. All ask for half the MACs."""
