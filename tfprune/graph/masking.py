"""Masks channels of a model where they are read, without rebuilding it.

A channel whose consumers' slices are zero is read by nobody: a masked model computes what the
pruned one does. Where normalisations take statistics across channels (layer and group
normalisation) these read the channels too; there the masked model leaves the removed ones out.
A removed block is computed like any other, but the addition at its end leaves it out.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.graph.blocks import blocks_of, removal
from tfprune.graph.context import Site
from tfprune.graph.copying import copy_model
from tfprune.graph.evaluate import Override, evaluate, flatten
from tfprune.graph.groups import ChannelGraph, analyse
from tfprune.graph.labels import Keep
from tfprune.graph.trace import map_leaves, trace

Array = NDArray[Any]
Kept = Mapping[str, Sequence[int] | NDArray[np.int64]]


def masked_weights(
    graph: ChannelGraph, keep: Keep, values: Mapping[str, Array]
) -> Iterator[tuple[Site, Array]]:
    """The weights that differ in the masked model, whole, with their values there.

    Args:
        graph: the analysed model.
        keep: which channels stay.
        values: new values for some weights, in the shape of their kept part
            (``PruningPlan.values``).
    """
    for site in graph.record.sites.values():
        new = values.get(site.full_name)
        value = None if new is None else _expanded(site, keep, new)
        for axis in site.masked:
            labels = site.labels[axis]
            if labels is None:
                continue
            kept = keep(labels)
            if not kept.all():
                value = np.asarray(site.variable).copy() if value is None else value
                index: list[Any] = [slice(None)] * value.ndim
                index[axis] = ~kept
                value[tuple(index)] = 0
        if value is not None:
            yield site, value


def masked_calls(
    graph: ChannelGraph, keep: Keep, blocks: Collection[str] = ()
) -> dict[int, Override]:
    """What stands in for some calls in the masked model, by the call's ``id``.

    These are the calls that take statistics across channels, and the additions of blocks.

    Args:
        graph: the analysed model.
        keep: which channels stay.
        blocks: names of the blocks that are removed.
    """
    statistics: dict[int, Override] = {
        key: functools.partial(masked, keep) for key, masked in graph.record.masked_calls.items()
    }
    sums: dict[int, Override] = {
        key: functools.partial(_sum_of, operands)
        for key, operands in removal(graph, blocks).operands.items()
    }
    return {**statistics, **sums}


def _sum_of(operands: Sequence[int], *tensors: Any) -> Any:
    """The sum of some of the tensors."""
    return functools.reduce(operator.add, [tensors[number] for number in operands])


def _expanded(site: Site, keep: Keep, new: Array) -> Array:
    """The whole weight with new values at its kept positions."""
    value = np.asarray(site.variable).copy()
    kept = [
        np.arange(size) if labels is None else np.flatnonzero(keep(labels))
        for size, labels in zip(value.shape, site.labels, strict=True)
    ]
    # The new values are the pruned model's, which are scaled where the masked model's are not.
    factor = 1.0 if site.scale is None else site.scale(keep)
    value[np.ix_(*kept)] = (new / factor).astype(value.dtype)
    return value


class MaskedModel:
    """A copy of a model whose channels can be masked again and again.

    Attributes:
        graph: of the copy; it has the groups of the source under the same names.
        model: the copy. Its weights are the source's, but where a mask or new values say otherwise.

    Args:
        source: the analysed model; it stays as it is.

    Raises:
        ModelError: a layer cannot be made from its configuration.
    """

    def __init__(self, source: ChannelGraph) -> None:
        self._source = source
        self.model = copy_model(source.model)
        self.graph = analyse(self.model)
        self._originals = _by_name(source)
        self._sites = _by_name(self.graph)
        self._changed: set[str] = set()
        self._overrides: dict[int, Override] = {}

    def mask(
        self,
        kept: Kept,
        values: Mapping[str, Array] | None = None,
        blocks: Collection[str] = (),
    ) -> None:
        """Masks all channels but the kept ones; what an earlier call masked is back.

        The statistics of batch normalisation stay as they are now; :meth:`restore` brings those of
        the source back.

        Args:
            kept: group name -> indices of the channels that stay; other groups keep everything.
            values: new values for some weights, as ``PruningPlan.values``.
            blocks: names of blocks that are left out.
        """
        keep = self._source.keep(kept)
        wanted = {
            site.full_name: value
            for site, value in masked_weights(self._source, keep, values or {})
        }
        for name in self._changed - wanted.keys():
            self._sites[name].variable.assign(np.asarray(self._originals[name].variable))
        for name, value in wanted.items():
            self._sites[name].variable.assign(value)
        self._changed = set(wanted)
        inexact = any(
            not self._source[name].exact and len(indices) < self._source[name].width
            for name, indices in kept.items()
        )
        self._overrides = {}
        if inexact or blocks:
            mine = _renamed(blocks, self._source, self.graph) if blocks else ()
            self._overrides = masked_calls(self.graph, self.graph.keep(kept), mine)

    def restore(self) -> None:
        """Gives all variables of the copy, statistics included, the source's values again."""
        for old, new in zip(self._source.model.variables, self.model.variables, strict=True):
            new.assign(np.asarray(old))
        self._changed, self._overrides = set(), {}

    @property
    def overrides(self) -> Mapping[int, Override]:
        """For :func:`~tfprune.graph.evaluate.evaluate` on :attr:`graph`, under the present mask."""
        return self._overrides

    def outputs(self, batch: Sequence[Any]) -> list[Array]:
        """The outputs in inference mode, flattened.

        Args:
            batch: one array per input, batch axis first.
        """
        if self._overrides:
            return [np.asarray(y) for y in evaluate(self.graph, batch, override=self._overrides)]
        return [np.asarray(y) for y in predict_on(self.model, batch)]


def _renamed(names: Collection[str], source: ChannelGraph, copy: ChannelGraph) -> list[str]:
    """The names of blocks in a copy of the model: Keras may number operations anew."""
    pairs = zip(blocks_of(source), blocks_of(copy), strict=True)
    known = {old.name: new.name for old, new in pairs}
    return [known[name] for name in names]


def predict_on(model: Any, batch: Sequence[Any]) -> list[Any]:
    """The outputs of a model in inference mode, compiled by its backend; flattened.

    Args:
        model: a functional or sequential model.
        batch: one array per input, batch axis first, in the order of the trace.
    """
    traced = trace(model)
    known = {ref.key: value for ref, value in zip(traced.inputs, batch, strict=True)}
    structure = map_leaves(lambda ref: known[ref.key], traced.input_structure)
    while isinstance(structure, list | tuple) and len(structure) == 1:
        structure = structure[0]
    return flatten(model.predict_on_batch(structure))


def _by_name(graph: ChannelGraph) -> dict[str, Site]:
    return {site.full_name: site for site in graph.record.sites.values()}
