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
    "group norm": lambda: methods.GroupNormSparsity(0.01, macs=0.5),
    "growing": lambda: methods.GrowingRegularisation(0.01, every=2, macs=0.5),
    "morphnet": lambda: methods.MorphNet(macs=0.5),
    "ssr": lambda: methods.SSR(0.01, every=4, macs=0.5),
    "sss": lambda: methods.SparseStructureSelection(0.05, macs=0.5),
    "csgd": lambda: methods.CentripetalSGD(1.0, macs=0.5),
    "cfp": lambda: methods.FilterCorrelation(episodes=2, episode_epochs=1, macs=0.5),
    "autopruner": lambda: methods.AutoPruner(8, macs=0.5, alpha=(0.1, 2.0), every=3),
    # alternating makes two steps of a batch
    "dcp": lambda: methods.DiscriminationAwarePruning(
        stripes(32), macs=0.5, batch_size=16, steps=2, per_pick=3, training="joint"
    ),
}
"""Name -> how to make the method. All ask for half the MACs."""
