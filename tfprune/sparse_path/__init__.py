"""Whether XNNPACK, LiteRT's CPU delegate, would compute a network with its sparse kernels.

The rules (``rules``) and XNNPACK's search for clusters (``clusters``) work on plain records
(``nodes``). Those come from a Keras model (``from_keras``) or, in ``tfprune.litert``, from a file.
"""

from __future__ import annotations

from tfprune.sparse_path.clusters import judge
from tfprune.sparse_path.from_keras import keras_network, keras_sparse_path
from tfprune.sparse_path.nodes import Kind, Network, Node, Window, same_padding
from tfprune.sparse_path.report import SparsePathReport, Verdict

__all__ = [
    "Kind",
    "Network",
    "Node",
    "SparsePathReport",
    "Verdict",
    "Window",
    "judge",
    "keras_network",
    "keras_sparse_path",
    "same_padding",
]
