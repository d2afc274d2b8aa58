"""Pruning methods, one file per paper. All have one form.

``prepare(model)`` returns the model to train, ``callbacks()`` what ``fit`` must be given, and
``finish(model)`` the finished model; ``run(model, train, validation, epochs=...)`` is the three in
a row around :func:`tfprune.fine_tune`. The methods here end in a model with zeros.

The lottery ticket (Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019,
arXiv:1803.03635; from memory) is a few lines on top: train, prune, put the weights back to what
they were at the start, or after some steps, and train what is left.

    >>> from tfprune.layers import with_masks
    >>> from tfprune.layers.masks import Masks
    >>> from tfprune.methods import GlobalMagnitude, plain_copy
    >>> early = plain_copy(model)                # the weights at the start, or after some steps
    >>> method = GlobalMagnitude(0.8, dense=True)
    >>> fine_tune(model, train, epochs=1, verbose=0).epochs
    1
    >>> masks = method.masks(model)              # chosen by the trained weights
    >>> ticket = with_masks(early, masks)        # the early weights, and the masks held
    >>> Masks.of_zeros(masks.apply(early)) == masks
    True
"""

from tfprune.methods.aofp import ApproximatedOracle, ApproximatedOracleResult
from tfprune.methods.autopruner import AutoPruner
from tfprune.methods.cfp import FilterCorrelation
from tfprune.methods.csgd import CentripetalSGD
from tfprune.methods.dcp import DiscriminationAwarePruning
from tfprune.methods.dsd import DSD
from tfprune.methods.expansion import (
    Expansion,
    ShrinkExpandResult,
    expand,
    shrink_expand,
)
from tfprune.methods.gdp import GlobalDynamicPruning
from tfprune.methods.global_magnitude import GlobalMagnitude, redrawn
from tfprune.methods.grasp import GraSP
from tfprune.methods.group_sparsity import GroupNormSparsity, GrowingRegularisation
from tfprune.methods.han import Han, corrected_dropout
from tfprune.methods.ista import ISTA
from tfprune.methods.magnitude import MagnitudePruning
from tfprune.methods.method import Method, MethodResult, plain_copy
from tfprune.methods.morphnet import MorphNet
from tfprune.methods.random import RandomPruning
from tfprune.methods.sfp import SoftFilterPruning
from tfprune.methods.slimming import NetworkSlimming
from tfprune.methods.snip import SNIP
from tfprune.methods.ssr import SSR
from tfprune.methods.sss import SparseStructureSelection
from tfprune.methods.structured import StructuredMethod, StructuredResult
from tfprune.methods.synflow import SynFlow

__all__ = [
    "DSD",
    "ISTA",
    "SNIP",
    "SSR",
    "ApproximatedOracle",
    "ApproximatedOracleResult",
    "AutoPruner",
    "CentripetalSGD",
    "DiscriminationAwarePruning",
    "Expansion",
    "FilterCorrelation",
    "GlobalDynamicPruning",
    "GlobalMagnitude",
    "GraSP",
    "GroupNormSparsity",
    "GrowingRegularisation",
    "Han",
    "MagnitudePruning",
    "Method",
    "MethodResult",
    "MorphNet",
    "NetworkSlimming",
    "RandomPruning",
    "ShrinkExpandResult",
    "SoftFilterPruning",
    "SparseStructureSelection",
    "StructuredMethod",
    "StructuredResult",
    "SynFlow",
    "corrected_dropout",
    "expand",
    "plain_copy",
    "redrawn",
    "shrink_expand",
]
