"""Rebuilds a model with fewer channels: new operations, the same graph, sliced weights.

The model's calls are replayed on new symbolic inputs. Each operation is made anew from its
configuration, with the entries that count channels replaced by what the labels say; then every
weight is the old one with the removed positions dropped, unless the plan has new values for it.
The calls of removed blocks are left out; what else their additions added takes their place. The
source is only read.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from tfprune.errors import ModelError
from tfprune.graph import ChannelGraph, analyse
from tfprune.graph.blocks import removal
from tfprune.graph.copying import unbuilt
from tfprune.graph.labels import Keep
from tfprune.graph.plan import PruningPlan
from tfprune.graph.remake import remake
from tfprune.graph.replay import Arguments, copy_trainable, replay
from tfprune.graph.trace import Call, Ref, is_compiled, is_model, with_values


def apply(model: Any, plan: PruningPlan) -> Any:
    """The model without the channels and blocks that ``plan`` drops.

    Args:
        model: a model of the architecture that the plan was made for, of Keras 3 or tf_keras.
            Its weights, names and graph stay as they are.
        plan: which channels each group keeps, the blocks that go, and new values for some weights:
            those are the pruned model's weights as they shall be, whatever the source's are.

    Returns:
        A new model of the same framework and kind, with the same names of layers, dtype policies,
        regularisers, initialisers and trainable flags. Compiled like the source (same optimiser,
        loss and metrics, fresh optimiser state) if that was compiled, else not.

    Raises:
        PlanError: the plan is for another model.
        ModelError: a layer cannot be made from its configuration.
    """
    graph = analyse(model)
    plan = plan.for_graph(graph)
    return Rebuilder(graph, graph.keep(plan.kept), plan.values, plan.blocks).model()


class Rebuilder:
    """Makes the smaller operations once each, and replays the calls on them."""

    def __init__(
        self,
        graph: ChannelGraph,
        keep: Keep,
        values: Mapping[str, Any] | None = None,
        blocks: Collection[str] = (),
    ) -> None:
        self._graph = graph
        self._values = values or {}
        self._record = graph.record
        self._keep = keep
        self._removal = removal(graph, blocks)
        self._made: dict[int, Any] = {}
        self._inputs: dict[int, Any] = {}

    def architecture(self) -> Any:
        """The whole smaller model, with the weights that its layers were made with."""
        result = self._model(self._graph.model)
        copy_trainable(self._graph.model, result, self._partner)
        return result

    def model(self) -> Any:
        """The whole smaller model, with weights."""
        source = self._graph.model
        result = self._model(source)
        self._copy_weights()
        copy_trainable(source, result, self._partner)
        _copy_compilation(source, result)
        return result

    def _model(self, source: Any) -> Any:
        return replay(
            self._record.traces[id(source)],
            make=self.rebuild,
            make_input=self._input,
            arguments=self._arguments,
            skipped=self._removal.skipped,
        )

    def _arguments(self, call: Call) -> Arguments:
        rewrite = self._record.argument_rewrites.get(id(call))
        args, kwargs = call.args, call.kwargs
        if rewrite is not None:
            args, kwargs = rewrite(self._keep, args, kwargs)
        return self._removal.arguments(call, args, kwargs)

    def _partner(self, old: Any) -> Any:
        """What was made of a layer; ``None`` for one that went with a block."""
        return self._made.get(id(old), self._inputs.get(id(old)))

    def _input(self, ref: Ref, layer: Any) -> Any:
        """An input layer; that of a nested model may see fewer channels."""
        config = layer.get_config()
        labels = self._record.tensors[ref.key]
        shape = tuple(
            size if known is None else int(self._keep(known).sum())
            for size, known in zip(ref.shape, labels, strict=True)
        )
        config["batch_shape" if self._graph.framework == "keras" else "batch_input_shape"] = shape
        made = self._inputs[id(layer)] = type(layer).from_config(config)
        return made

    def rebuild(self, op: Any) -> Any:
        """The smaller form of an operation; the same object however often it is asked for."""
        known = self._made.get(id(op))
        if known is None:
            known = self._made[id(op)] = self._model(op) if is_model(op) else self._operation(op)
        return known

    def _operation(self, op: Any) -> Any:
        builder = self._record.builders.get(id(op))
        if builder is not None:
            return builder(self._keep, self.rebuild)

        def smaller(config: dict[str, Any]) -> Any:
            for rewrite in self._record.rewrites.get(id(op), {}).values():
                config.update(rewrite(self._keep))
            return unbuilt(config)

        return remake(op, smaller, self._record.paths.get(id(op), ""))

    def _copy_weights(self) -> None:
        for op_id, new in self._made.items():
            old = self._record.ops.get(op_id)
            if old is None or is_model(old):
                continue
            sources, targets = _variables(old), _variables(new)
            if len(sources) != len(targets):
                raise ModelError(
                    f"Expected {type(old).__name__} at {self._record.paths[op_id]!r} to have "
                    f"{len(sources)} weights again after rebuilding. Received: {len(targets)}. "
                    "Its constructor or build method makes weights that its configuration does "
                    "not describe."
                )
            for source, target in zip(sources, targets, strict=True):
                self._copy(source, target, self._record.paths[op_id])
        for op_id, new in self._made.items():
            finisher = self._record.finishers.get(op_id)
            if finisher is not None:
                finisher(self._keep, new)

    def _copy(self, source: Any, target: Any, path: str) -> None:
        value = np.asarray(source)
        site = self._record.sites.get(id(source))
        if site is not None:
            for axis, labels in enumerate(site.labels):
                if labels is not None:
                    value = np.compress(self._keep(labels), value, axis=axis)
            if site.scale is not None:
                value = (value * site.scale(self._keep)).astype(value.dtype)
            new = self._values.get(site.full_name)
            if new is not None:
                value = new.astype(value.dtype)
        if tuple(value.shape) != tuple(int(size) for size in target.shape):
            raise ModelError(
                f"Expected weight {getattr(source, 'name', '?')!r} of {path!r} to have shape "
                f"{tuple(value.shape)} after pruning. Received: {tuple(target.shape)}. "
                "The rule of this layer does not describe all of its weights."
            )
        target.assign(value)


def _variables(op: Any) -> list[Any]:
    """Weights and other state (seeds, counters), in an order that depends on the class only."""
    return with_values(getattr(op, "variables", []))


def _copy_compilation(source: Any, target: Any) -> None:
    if not is_compiled(source):
        return
    try:
        config = source.get_compile_config()
        if config:
            target.compile_from_config(config)
    except Exception as error:  # noqa: BLE001 - whatever a user's loss or metric may raise
        warnings.warn(
            f"The pruned model is not compiled: the source's loss, metrics or optimiser cannot be "
            f"made again from their configuration ({type(error).__name__}: {error}). Call "
            "compile() on it.",
            stacklevel=2,
        )
