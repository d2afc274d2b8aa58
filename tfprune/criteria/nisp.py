r"""NISP: what a channel is worth for the features that the classifier sees.

Reference: Yu, Li, Chen, Lai, Morariu, Han, Gao, Lin and Davis, "NISP: Pruning Networks using Neuron
Importance Score Propagation", CVPR 2018 (arXiv:1711.05908). There is no official code, and the
paper's text was not at hand; the method is recalled, and in part read in a public port.

1. The *final response layer* is what the classifier takes in. Its features are ranked on data by
   infinite feature selection (:mod:`tfprune.criteria.feature_ranking`), without labels.
2. The scores are handed down through absolute weights: for a layer
   :math:`f(x) = \sigma(W x + b)` with a Lipschitz activation,

   .. math:: s_{k,j} = \sum_i |w^{(k+1)}_{i,j}| \, s_{k+1,i},

   which bounds, up to a constant, what the final responses lose with neuron j of layer k. What each
   kind of layer hands down is told in :mod:`tfprune.criteria.score_propagation`; where a tensor is
   read several times, the contributions are added up.
3. From the output to the input, the channels of lowest score go; the score of a channel that went
   is not handed down (recalled, and so in the port).

Departures and choices.

- A channel's score is the sum, over positions and over all layers that *read* it, of what these
  layers hand it. In a chain that is the paper's :math:`s_k` behind the activation, where a removed
  channel is masked; in a residual stream each reader counts once, whereas summing over all tensors
  of the stream would count the last reader once per block.
- The classifier is the last operation with weights of its own before an output, the features are
  its inputs along the axis of the channels. Where it reads maps, features are means over positions,
  and the score of a feature is shared out evenly among them. Several outputs: each tensor that a
  classifier reads is ranked by itself, and the scores are added up.
- A residual stream's score is complete only once its first block was reached. Blocks above were
  chosen by then, with the stream whole; the sweep then starts again, with what is chosen fixed.
- Channels that stand in no tensor between layers (attention heads) are scored by the L1 norm of
  their filters, as in :mod:`tfprune.criteria.feature_maps`.
- Scores are kept with a common exponent: products of many layers overflow otherwise.

The score does not see how large a channel's activations are. Networks with batch normalisation
even that out. The paper does not prune the final response layer itself; name it in ``ignore``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.batches import iterate
from tfprune.criteria.feature_ranking import check_alpha, infinite_feature_selection
from tfprune.criteria.gates import Remembered, require_tensorflow
from tfprune.criteria.norm import L1
from tfprune.criteria.score_propagation import Way, kind_of, way_back
from tfprune.criteria.scores import Normalize, Scores, Vector, normalized
from tfprune.criteria.selection import Indices, Quota, Selection
from tfprune.errors import ArgumentError, ModelError
from tfprune.graph import ChannelGraph
from tfprune.graph.evaluate import evaluate, flatten
from tfprune.graph.labels import Labels
from tfprune.graph.trace import Call, Ref, Trace, is_model

Array = NDArray[np.float64]
Key = tuple[int, int, int]
Ranking = Callable[[NDArray[np.floating[Any]]], Vector]

# Examples at which the Jacobians of layers without a rule of their own are taken.
_EXAMPLES = 8


@dataclass(frozen=True)
class NISP:
    """Importance for the classifier's features, handed down through absolute weights.

    Needs TensorFlow, for the products with Jacobians.

    Args:
        data: training data; labels are not used. A few thousand examples do.
        alpha: of infinite feature selection: weight of a feature's spread against its lack of
            correlation with the others.
        batches: how many batches to use; ``None`` for all.
        batch_size: for arrays.
        normalize: what each group's scores are divided by. The paper compares within a layer.
        ranking: scores for the features of a classifier in place of infinite feature selection: a
            function of a table, shape ``(examples, features)``, to non-negative numbers, shape
            ``(features,)``.
        most_features: more than that many features of one classifier are refused: ranking them
            takes time with the cube of their number.
    """

    data: Any
    alpha: float = 0.5
    batches: int | None = 32
    batch_size: int = 64
    normalize: Normalize = "mean"
    ranking: Ranking | None = None
    most_features: int = 8192
    _found: Remembered = field(default_factory=Remembered, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_alpha(self.alpha)

    def __call__(self, graph: ChannelGraph) -> Scores:
        """Scores of every prunable group, with nothing pruned.

        Raises:
            ArgumentError: the model runs on another backend than TensorFlow, or a classifier has
                too many features.
            DataError: no examples or only one, or features that are not finite.
            ModelError: no operation with weights leads to an output.
        """
        ways = self._prepare(graph)
        sweep = Sweep(graph, ways)
        sweep.run()
        self._found.put(graph, (ways, sweep))
        scores = self._scores(graph, sweep)
        return Scores(scores, f"neuron importance score propagation (NISP, {ways.batches} batches)")

    def select(self, graph: ChannelGraph, quotas: Mapping[str, Quota]) -> Selection:
        """From the output to the input; what went is not handed down any more.

        Right after a call on the same graph, its pass over the data is used again.
        """
        if (remembered := self._found.take(graph)) is None:
            ways = self._prepare(graph)
            remembered = ways, Sweep(graph, ways)
            remembered[1].run()
        ways, dense = remembered
        kept: dict[str, Indices] = {}
        whole = False
        while not whole:
            sweep = Sweep(graph, ways, kept, quotas, dense)
            sweep.run()
            whole = sweep.whole
        for name in quotas.keys() - kept.keys():
            kept[name] = quotas[name].best(self._scores(graph, dense)[name])
        return Selection(kept)

    def _prepare(self, graph: ChannelGraph) -> Ways:
        require_tensorflow(graph, "scores")
        rank = self.ranking or (lambda table: infinite_feature_selection(table, self.alpha))
        return prepare(
            graph,
            self.data,
            rank,
            batches=self.batches,
            batch_size=self.batch_size,
            most_features=self.most_features,
        )

    def _scores(self, graph: ChannelGraph, sweep: Sweep) -> dict[str, Vector]:
        found = {n: sweep.totals[n] for n in sweep.totals if sweep.visits.get(n)}
        exponent = max((total.exponent for total in found.values()), default=0)
        fallback = L1(normalize=self.normalize)(graph)
        result: dict[str, Vector] = {}
        for group in graph.prunable:
            total = found.get(group.name)
            if total is None:
                result[group.name] = fallback[group.name]
            elif self.normalize == "none":
                result[group.name] = np.ldexp(total.values, total.exponent - exponent)
            else:
                result[group.name] = normalized(total.values, self.normalize)
        return result


@dataclass(frozen=True, eq=False)
class Scaled:
    """``values * 2**exponent``, with a largest value between one half and one (or all zeros)."""

    values: Array
    exponent: int

    @classmethod
    def of(cls, values: Any, exponent: int = 0) -> Scaled:
        """Shifts the size of the values into the exponent."""
        array = np.asarray(values, np.float64)
        _, shift = np.frexp(np.abs(array).max(initial=0.0))
        if not array.any():
            return cls(array, -(2**20))
        return cls(np.ldexp(array, -int(shift)), exponent + int(shift))

    def at(self, exponent: int) -> Array:
        """The values for another exponent."""
        return np.asarray(np.ldexp(self.values, self.exponent - exponent))

    def __add__(self, other: Scaled) -> Scaled:
        exponent = max(self.exponent, other.exponent)
        return Scaled.of(self.at(exponent) + other.at(exponent), exponent)


@dataclass(frozen=True, eq=False)
class Standing:
    """Where channels of a group stand in an input that a call reads: see ``Member``."""

    group: str
    number: int
    axis: int
    positions: Labels
    channels: Labels


@dataclass(frozen=True, eq=False)
class Ways:
    """Everything that a sweep needs to know of the data.

    Attributes:
        seeds: ``id`` of a classifier's call -> scores of its inputs, ``None`` for those that
            another classifier counts.
        ways: ``id`` of a call -> how it hands scores down.
        standing: ``id`` of a call -> the channels that it reads.
        batches: how many were used.
    """

    seeds: Mapping[int, Sequence[Array | None]]
    ways: Mapping[int, Way]
    standing: Mapping[int, Sequence[Standing]]
    batches: int


class Sweep:
    """One way from the outputs to the inputs.

    Attributes:
        totals: group name -> its channels' scores.
        visits: group name -> how many calls read it.
        last_visit: group name -> number of the last of these calls in the sweep.
        whole: whether it came to the inputs; else a group was chosen whose score had been handed
            down before, and the next sweep must start over.

    Args:
        graph: the analysed model.
        ways: from :func:`prepare`.
        kept: group name -> channels chosen so far; the others hand nothing down. More are added.
        quotas: the groups to choose from, once their scores are complete.
        dense: an earlier sweep with nothing pruned, which knows when that is.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        ways: Ways,
        kept: dict[str, Indices] | None = None,
        quotas: Mapping[str, Quota] | None = None,
        dense: Sweep | None = None,
    ) -> None:
        self._graph, self._ways = graph, ways
        self._kept = {} if kept is None else kept
        self._quotas = quotas or {}
        self._complete = {} if dense is None else dense.last_visit
        self._expected = {} if dense is None else dense.visits
        self.totals: dict[str, Scaled] = {}
        self.visits: dict[str, int] = {}
        self.last_visit: dict[str, int] = {}
        self.whole = True
        self._number = 0

    def run(self) -> None:
        """Goes all the way, or to the first choice that makes a new start necessary."""
        self._back(self._graph.trace, {})

    def _back(self, traced: Trace, scores: dict[Key, Scaled]) -> None:
        """Turns the scores of a model's outputs into those of its inputs, in place."""
        for call in reversed(traced.calls):
            outputs = [scores.pop(ref.key, None) for ref in call.outputs]
            if is_model(call.op):
                inner = self._graph.record.traces[id(call.op)]
                inside: dict[Key, Scaled] = {}
                for ref, score in zip(inner.outputs, outputs, strict=True):
                    _add(inside, ref.key, score)
                self._back(inner, inside)
                if not self.whole:
                    return
                inputs = [inside.pop(ref.key, None) for ref in inner.inputs]
            else:
                inputs = self._read(call, self._hand_down(call, outputs))
                if not self.whole:
                    return
            for ref, score in zip(call.inputs, inputs, strict=True):
                _add(scores, ref.key, score)

    def _hand_down(self, call: Call, outputs: Sequence[Scaled | None]) -> list[Scaled | None]:
        result: list[Scaled | None] = [None] * len(call.inputs)
        known = [score for score in outputs if score is not None]
        if known:
            exponent = max(score.exponent for score in known)
            found = self._ways.ways[id(call)](
                [None if score is None else score.at(exponent) for score in outputs]
            )
            result = [None if part is None else Scaled.of(part, exponent) for part in found]
        for number, seed in enumerate(self._ways.seeds.get(id(call), ())):
            if seed is not None:
                part, before = Scaled.of(seed), result[number]
                result[number] = part if before is None else before + part
        return result

    def _read(self, call: Call, inputs: list[Scaled | None]) -> list[Scaled | None]:
        """Counts what a call hands to the channels that it reads; removed ones get nothing."""
        standing = self._ways.standing.get(id(call), ())
        if not standing:
            return inputs
        self._number += 1
        for place in standing:
            score = inputs[place.number]
            total = np.zeros(self._graph[place.group].width)
            if score is not None:
                others = tuple(a for a in range(score.values.ndim) if a != place.axis)
                per_position = score.values.sum(others)
                np.add.at(total, place.channels, per_position[place.positions])
            part = Scaled.of(total, 0 if score is None else score.exponent)
            known = self.totals.get(place.group)
            self.totals[place.group] = part if known is None else known + part
        for name in dict.fromkeys(place.group for place in standing):
            self.visits[name] = self.visits.get(name, 0) + 1
            self.last_visit[name] = self._number
            if self._complete.get(name) == self._number and name in self._quotas:
                self._choose(name)
        for place in standing:
            score = inputs[place.number]
            if score is not None and place.group in self._kept:
                removed = ~np.isin(place.channels, self._kept[place.group])
                values = np.moveaxis(score.values.copy(), place.axis, 0)
                values[place.positions[removed]] = 0
                inputs[place.number] = Scaled.of(np.moveaxis(values, 0, place.axis), score.exponent)
        return inputs

    def _choose(self, name: str) -> None:
        if name not in self._kept:
            self._kept[name] = self._quotas[name].best(self.totals[name].values)
            # With one reader its score was not handed down yet.
            self.whole = self.whole and self._expected[name] == 1


def _add(scores: dict[Key, Scaled], key: Key, score: Scaled | None) -> None:
    if score is not None:
        before = scores.get(key)
        scores[key] = score if before is None else before + score


def prepare(
    graph: ChannelGraph,
    data: Any,
    rank: Ranking,
    *,
    batches: int | None,
    batch_size: int,
    most_features: int,
) -> Ways:
    """Ranks the classifiers' features on data, and finds how every call hands scores down.

    Args:
        graph: the analysed model.
        data, batches, batch_size: see :func:`tfprune.batches.iterate`.
        rank: from features to scores.
        most_features: of one classifier.

    Raises:
        ArgumentError, DataError, ModelError: see :class:`NISP`.
    """
    found = classifiers(graph)
    if not any(call.inputs for call in found):
        raise ModelError(
            "Expected a model in which an operation with weights leads to an output. Received: "
            f"{graph.model.name!r}, which has none. NISP starts at the inputs of the last ones."
        )
    calls = [
        call
        for traced in graph.record.traces.values()
        for call in traced.calls
        if not is_model(call.op)
    ]
    features: dict[Key, tuple[int, int]] = {}
    for call in found:
        for number, ref in enumerate(call.inputs):
            if ref.dtype.startswith(("float", "bfloat")):
                features.setdefault(ref.key, (id(call), number))
    products = {id(call) for call in calls if kind_of(call) == "product"}
    on_examples = {id(call) for call in calls if kind_of(call) == "data"}

    tables: dict[tuple[int, int], list[Array]] = {place: [] for place in features.values()}
    means: dict[tuple[int, int], Array] = {}
    shapes: dict[int, list[list[Any]]] = {}
    axes = {
        (id(call), number): _feature_axis(graph, ref)
        for call in found
        for number, ref in enumerate(call.inputs)
    }
    examples = used = 0
    collect = _collector(graph, set(features.values()), axes, products)
    input_shape = getattr(graph.model, "input_shape", None)
    for x, _ in iterate(data, batch_size=batch_size, limit=batches, input_shape=input_shape):
        inputs = [np.asarray(part) for part in flatten(x)]
        if not used:
            shapes = _examples(graph, inputs, on_examples, axes, most_features)
        read, magnitudes = collect(inputs)
        for place, table in read.items():
            tables[place].append(table)
        for place, total in magnitudes.items():
            means[place] = means[place] + total if place in means else total
        examples += len(inputs[0])
        used += 1
    points = {
        key: [[means[key, number][None] / examples for number in range(len(values[0]))]]
        if key in products
        else values
        for key, values in shapes.items()
    }
    seeds: dict[int, list[Array | None]] = {id(c): [None] * len(c.inputs) for c in found}
    for (key, number), parts in tables.items():
        values = _ranked(rank, np.concatenate(parts))
        like = np.asarray(shapes[key][0][number])
        axis = axes[key, number] % like.ndim
        shape = [1] * like.ndim
        shape[axis] = -1
        share = values.reshape(shape) * like.shape[axis] / like.size
        seeds[key][number] = np.broadcast_to(share, like.shape)
    return Ways(
        seeds,
        {id(call): way_back(call, points[id(call)]) for call in calls if id(call) in points},
        {id(call): list(_standing(graph, call)) for call in calls},
        used,
    )


def _ranked(rank: Ranking, table: Array) -> Vector:
    values = np.asarray(rank(table), np.float64)
    if values.shape != table.shape[1:] or not (np.isfinite(values) & (values >= 0)).all():
        raise ArgumentError(
            f"Expected a ranking that gives {table.shape[1]} finite numbers, none of them negative."
            f" Received: shape {values.shape}, from {np.min(values)} to {np.max(values)}."
        )
    return values


def classifiers(graph: ChannelGraph) -> list[Call]:
    """The last calls before each output whose operation makes channels with weights of its own."""
    making = {
        path
        for site in graph.record.sites.values()
        if "produces" in site.roles and site.scored
        for path in accumulate(site.path.split("/"), "{}/{}".format)
    }
    found: dict[int, Call] = {}

    def walk(traced: Trace, wanted: set[Key]) -> set[Key]:
        """The inputs of a model from which some of its tensors come without a classifier."""
        for call in reversed(traced.calls):
            mine = [n for n, ref in enumerate(call.outputs) if ref.key in wanted]
            if not mine:
                continue
            if is_model(call.op):
                inner = graph.record.traces[id(call.op)]
                reached = walk(inner, {inner.outputs[n].key for n in mine})
                pairs = zip(inner.inputs, call.inputs, strict=True)
                wanted |= {outer.key for ref, outer in pairs if ref.key in reached}
            elif graph.record.paths.get(id(call.op)) in making:
                found[id(call)] = call
            else:
                wanted |= {ref.key for ref in call.inputs}
        return wanted

    walk(graph.trace, {ref.key for ref in graph.trace.outputs})
    return list(found.values())


def _feature_axis(graph: ChannelGraph, ref: Ref) -> int:
    """The first axis of a tensor that carries channels, else the last."""
    labels = graph.record.tensors.get(ref.key, ())
    return next((axis for axis, known in enumerate(labels) if axis and known is not None), -1)


def _collector(
    graph: ChannelGraph,
    features: set[tuple[int, int]],
    axes: Mapping[tuple[int, int], int],
    products: set[int],
) -> Any:
    """A function from a batch to the classifiers' features and sums of factors' magnitudes."""
    import tensorflow as tf

    @tf.function(autograph=False)  # type: ignore[untyped-decorator,unused-ignore]
    def collect(inputs: Any) -> Any:
        tables: dict[tuple[int, int], Any] = {}
        factors: dict[tuple[int, int], list[Any]] = {}

        def observe(call: Call, tensors: Sequence[Any]) -> None:
            for number, tensor in enumerate(tensors):
                place = id(call), number
                if place in features:
                    rank = len(tensor.shape)
                    others = [a for a in range(1, rank) if a != axes[place] % rank]
                    tables[place] = tf.reduce_mean(tensor, others) if others else tensor
                if id(call) in products:
                    total = tf.reduce_sum(tf.abs(tf.cast(tensor, tf.float32)), 0)
                    factors.setdefault(place, []).append(total)

        evaluate(graph, inputs, observe=observe)
        # A nested model that is called again has the same factors once more.
        return tables, {place: tf.add_n(t) / len(t) for place, t in factors.items()}

    def run(inputs: Sequence[Any]) -> tuple[dict[Any, Array], dict[Any, Array]]:
        tables, totals = collect([tf.convert_to_tensor(part) for part in inputs])
        return _arrays(tables), _arrays(totals)

    return run


def _arrays(tensors: Mapping[Any, Any]) -> dict[Any, Array]:
    return {key: np.asarray(tensor).astype(np.float64) for key, tensor in tensors.items()}


def _examples(
    graph: ChannelGraph,
    inputs: Sequence[Any],
    on_examples: set[int],
    axes: Mapping[tuple[int, int], int],
    most_features: int,
) -> dict[int, list[list[Any]]]:
    """``id`` of a call -> its inputs for some examples, each a batch of one.

    Of calls that do not need them there is one example, with zeros that take no memory.
    """
    import tensorflow as tf

    found: dict[int, list[list[Any]]] = {}
    last = min(_EXAMPLES, len(inputs[0])) if on_examples else 1
    for row in range(last):

        def observe(call: Call, tensors: Sequence[Any], row: int = row) -> None:
            if id(call) in on_examples:
                found.setdefault(id(call), []).append([np.asarray(t) for t in tensors])
            elif not row:
                found[id(call)] = [
                    [np.broadcast_to(np.zeros((), _numpy(t)), t.shape) for t in tensors]
                ]
            for number, tensor in enumerate(tensors):
                axis = axes.get((id(call), number))
                if axis is not None and tensor.shape[axis] > most_features:
                    raise ArgumentError(
                        f"Expected at most {most_features} features of a classifier. Received: "
                        f"{tensor.shape[axis]} at the input of {call.op.name!r}. Ranking them "
                        "takes long; raise most_features if that is well, or give a ranking."
                    )

        one = [tf.convert_to_tensor(part[row : row + 1]) for part in inputs]
        evaluate(graph, one, observe=observe)
    return found


def _numpy(tensor: Any) -> Any:
    return np.dtype(np.float32) if tensor.dtype.is_floating else tensor.dtype.as_numpy_dtype


def _standing(graph: ChannelGraph, call: Call) -> Iterator[Standing]:
    """The channels of prunable groups that stand in a call's inputs and that it reads."""
    path = graph.record.paths.get(id(call.op), "")
    for number, ref in enumerate(call.inputs):
        for axis, labels in enumerate(graph.record.tensors.get(ref.key, ())):
            if labels is None or axis == 0:
                continue
            channels = graph.channels(labels)
            owners = graph.group_of[channels]
            for index in np.unique(owners[owners >= 0]).tolist():
                group = graph.groups[index]
                reads = any(
                    m.path == path or m.path.startswith(f"{path}/") for m in group.consumers
                )
                if group.prunable and reads:
                    positions = np.flatnonzero(owners == index)
                    members = graph.index_of[channels[positions]]
                    yield Standing(group.name, number, axis, positions, members)
