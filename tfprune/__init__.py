"""tfprune makes trained Keras networks smaller and faster for phones.

Everything public is reachable from here and loaded on first use, so that ``import tfprune`` stays
light: no Keras, TensorFlow, LiteRT, TFDS or matplotlib until something needs it.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "analyse": "tfprune.graph",
    "ChannelGraph": "tfprune.graph",
    "PruningPlan": "tfprune.graph.plan",
    "rule": "tfprune.graph",
    "plan": "tfprune.pruning",
    "prune": "tfprune.pruning",
    "verify": "tfprune.surgery",
    "recalibrate_batch_norm": "tfprune.protocols",
    "fine_tune": "tfprune.protocols",
    "export": "tfprune.litert",
    "benchmark": "tfprune.litert",
    "compare": "tfprune.reports",
    "prune_low_magnitude": "tfprune.layers",
    "strip_pruning": "tfprune.layers",
    "prune_scope": "tfprune.layers",
    "UpdatePruningStep": "tfprune.layers",
    "PruningSummaries": "tfprune.layers",
    "PrunableLayer": "tfprune.layers",
    "PruningPolicy": "tfprune.layers",
    "PruneForLatencyOnXNNPack": "tfprune.layers",
    "TfpruneError": "tfprune.errors",
}
_MODULES = (
    "allocation",
    "cost",
    "criteria",
    "data",
    "graph",
    "layers",
    "litert",
    "methods",
    "protocols",
    "reports",
    "schedules",
    "search",
    "sparsity",
    "surgery",
    "zoo",
)

__all__ = [*_EXPORTS, *_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("tfprune")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"tfprune.{name}")
    raise AttributeError(f"module 'tfprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
