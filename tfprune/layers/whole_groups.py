"""Grouped convolutions that lose whole groups.

The channel graph lets a grouped convolution lose the same offsets in every group. For a network
with many small groups, such as ResNeXt, that is coarse, and it ties channels that have nothing to
do with each other: with 32 groups of 4 channels there are four steps, each of a channel in every
group. Whole groups are 32 steps, and what goes together, all that a group reads and makes, does
belong together. :func:`with_whole_groups` says that a model's grouped convolutions are to be pruned
so; scores, plans, methods and surgery then do it without knowing more, and
:func:`without_whole_groups` makes plain convolutions of them again, with fewer groups.

In a chain of a convolution, a grouped one and a third, the first loses the filters that the removed
groups read, and the third the inputs that they made. Where the channels are shuffled between two
grouped convolutions, or are part of a residual stream, whole groups may be tied to each other until
nothing can go; ``tfprune.analyse`` says so.

Reference: the structures "groups" of Z. Huang and N. Wang, "Data-Driven Sparse Structure Selection
for Deep Neural Networks", ECCV 2018, arXiv:1707.01213, for ResNeXt; sheet A5. Inferred from the
structure that the authors' code prunes, not read in it: that inputs and outputs of a group go
together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from tfprune.errors import ModelError
from tfprune.graph import rule
from tfprune.graph.rewriting import rewritten
from tfprune.graph.rules.convolution import whole_groups
from tfprune.graph.trace import framework_of


@keras.saving.register_keras_serializable(package="tfprune")
class WholeGroupsConv1D(keras.layers.Conv1D):  # type: ignore[misc]
    """A grouped ``Conv1D`` that loses whole groups."""


@keras.saving.register_keras_serializable(package="tfprune")
class WholeGroupsConv2D(keras.layers.Conv2D):  # type: ignore[misc]
    """A grouped ``Conv2D`` that loses whole groups."""


@keras.saving.register_keras_serializable(package="tfprune")
class WholeGroupsConv3D(keras.layers.Conv3D):  # type: ignore[misc]
    """A grouped ``Conv3D`` that loses whole groups."""


_KINDS = {
    keras.layers.Conv1D: WholeGroupsConv1D,
    keras.layers.Conv2D: WholeGroupsConv2D,
    keras.layers.Conv3D: WholeGroupsConv3D,
}
_PLAIN = {kind: plain for plain, kind in _KINDS.items()}

for _kind in _PLAIN:
    rule(_kind, whole_groups)


def with_whole_groups(model: Any) -> Any:
    """A copy of a model whose grouped convolutions lose whole groups when it is pruned.

    The outputs are the same. Depthwise convolutions, and plain ones with a group per channel, do so
    anyway.

    Args:
        model: a functional or sequential Keras 3 model; nested models are looked through.

    Raises:
        ModelError: another kind of model.
    """
    if framework_of(model) != "keras":
        raise ModelError(
            f"Expected a Keras 3 model. Received: {type(model).__name__} of tf_keras. Build the "
            "model with keras."
        )

    def replace(op: Any, copied: Callable[..., Any]) -> Any:
        return copied(op, _KINDS.get(type(op)) if getattr(op, "groups", 1) != 1 else None)

    return rewritten(model, lambda _: replace)


def without_whole_groups(model: Any) -> Any:
    """A copy of a model with plain grouped convolutions again.

    Args:
        model: from :func:`with_whole_groups`, or from surgery on one.

    Raises:
        ModelError: not a functional or sequential model.
    """

    def replace(op: Any, copied: Callable[..., Any]) -> Any:
        return copied(op, _PLAIN.get(type(op)))

    return rewritten(model, lambda _: replace)
