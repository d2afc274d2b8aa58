"""XNNPACK's search for parts of a model that its sparse kernels can compute.

Sources. *Read*: ``xnn_subgraph_rewrite_for_nchw`` in XNNPACK's ``src/subgraph.c``: from every end
(a mean over space, or depth-to-space) it goes up from readers to writers and down again, joins
compatible operations to clusters, drops a cluster one of whose operations reads an input of the
model, a model output or an incompatible operation, or one of whose tensors is read from outside,
and takes the rest if more than two thirds of their 1x1 weights are zero.

*Measured*, with ai-edge-litert 2.3.0 and the processor's AVX hidden from it: what follows from that
search. ``python -m benchmarks.sparse_path`` measures it again, on the networks of
``tests/sparse_path`` and on MobileNets. Further networks were seen once, by scripts that were not
kept, among them all that end with depth-to-space and most of the unary operations.

The search does not look at what a cluster *writes*. A cluster that an incompatible operation cuts
off is taken all the same, if some mean in the model could end one; its last operation then writes
in the wrong layout, and the outputs are wrong numbers, or loading fails. :func:`judge` calls that
``"broken"``. A mean ends a cluster well with ``keepdims=False``; with ``keepdims=True`` its output
gets the shape (1, C, 1, 1), and only a 1x1 convolution inside the cluster (as in squeeze and
excitation) or a layer that flattens can read it. A dense layer on the channels of an image belongs
to the cluster and its weights count; one behind the mean does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator

from tfprune.sparse_path.nodes import Network, Node
from tfprune.sparse_path.report import SparsePathReport
from tfprune.sparse_path.rules import Problem, Role, fused, role

_SPATIAL = {1, 2}
_KEEP_DIMS = Problem(
    "a mean with keepdims=True at the end of the sparse path, whose output XNNPACK gives the wrong "
    "shape",
    "Use GlobalAveragePooling2D() without keepdims, and Dense behind it in place of a 1x1 "
    "convolution",
)


def judge(network: Network) -> SparsePathReport:
    """Whether XNNPACK computes a network sparsely, and what stands against it.

    Args:
        network: Its operations. The numbers of zeros in the kernels decide, too: those of the 1x1
            convolutions of one cluster together must be more than two thirds.

    Returns:
        The verdict, with the first layer in the way.
    """
    network = fused(network)
    graph = _Graph(network)
    clusters = _Clusters(graph)
    offence = next(_offences(graph), None)
    if clusters.sparse_tensors:
        leak = _leak(graph, clusters.sparse_tensors)
        if leak is None:
            return _report("sparse", None, clusters.pointwise(taken=True))
        # the operation that cuts the cluster off says more than the one that is cut off
        return _report("broken", offence or leak, clusters.pointwise(taken=True))
    if offence is not None:
        return _report("dense", offence, [n for n in network.nodes if n.pointwise])
    return _report("dense", _too_dense(graph, clusters), clusters.pointwise(taken=False))


def _report(
    verdict: str, offence: tuple[Node | None, Problem] | None, convolutions: list[Node]
) -> SparsePathReport:
    node, problem = offence or (None, Problem("", ""))
    return SparsePathReport(
        verdict="sparse" if verdict == "sparse" else "broken" if verdict == "broken" else "dense",
        layer="" if node is None else f"{node.what} {node.layer!r}",
        reason=problem.reason,
        remedy=problem.remedy,
        convolutions=tuple(node.layer for node in convolutions),
        zeros=sum(node.zeros for node in convolutions),
        parameters=sum(node.parameters for node in convolutions),
    )


class _Graph:
    """A network with who writes and who reads each tensor."""

    def __init__(self, network: Network) -> None:
        self.nodes = network.nodes
        self.outputs = network.outputs
        self.roles: list[Role] = [role(node) for node in self.nodes]
        self.writer = {t: i for i, node in enumerate(self.nodes) for t in node.outputs}
        self.readers: Counter[Hashable] = Counter()
        self.external: set[Hashable] = set(network.outputs)
        for node in self.nodes:
            self.readers.update(set(node.inputs))
            for tensor in node.inputs:
                writer = self.writer.get(tensor)
                if writer is None or self.nodes[writer].part != node.part:
                    self.external.add(tensor)
        # to XNNPACK the world outside reads each external tensor once
        self.readers.update(tensor for tensor in self.external if tensor in self.writer)

    def only_pointwise_read(self, node: Node) -> bool:
        """Whether 1x1 convolutions and dense layers are all that reads what a node writes."""
        tensors = set(node.outputs)
        return all(n.pointwise for n in self.nodes if tensors.intersection(n.inputs))

    def only_flattened(self, node: Node) -> bool:
        """Whether dense layers that flatten are all that reads what a node writes."""
        tensors = set(node.outputs)
        readers = [n for n in self.nodes if tensors.intersection(n.inputs)]
        flat = all(n.kind == "dense" and not n.keep_dims for n in readers)
        return bool(readers) and flat and not tensors.intersection(self.outputs)


class _Clusters:
    """XNNPACK's search, step by step as it does it."""

    def __init__(self, graph: _Graph) -> None:
        self.graph = graph
        count = len(graph.nodes)
        self.leader = list(range(count))
        self.dropped = [False] * count
        self.end = [found.end for found in graph.roles]
        self._join()
        for index in range(count):
            if self.dropped[index]:
                self.dropped[self.leader[index]] = True
        self._drop_those_read_from_outside()
        self.sparse_tensors = self._layouts()

    def pointwise(self, *, taken: bool) -> list[Node]:
        """The 1x1 convolutions of the clusters that are taken, or of all that might be."""
        return [
            node
            for index, node in enumerate(self.graph.nodes)
            if node.pointwise
            and self._alive(index)
            and (not taken or self.sparse_tensors.intersection(node.inputs))
        ]

    def _join(self) -> None:
        graph = self.graph
        begun = set()
        for index, node in enumerate(graph.nodes):
            if self.end[index] and self._join_writers(index, node):
                begun.add(node.part)
        # XNNPACK gives up on a part of the model in which no end has found a writer
        for index, node in enumerate(graph.nodes):
            self.dropped[index] |= node.part not in begun
        changed = bool(begun)
        while changed:
            changed = False
            for index, node in enumerate(graph.nodes):
                if not self.dropped[index] and (graph.roles[index].inside or self.end[index]):
                    changed |= self._join_writers(index, node)

    def _join_writers(self, index: int, node: Node) -> bool:
        changed = False
        for tensor in node.inputs:
            if tensor in self.graph.external:
                self.dropped[index] = True
                continue
            writer = self.graph.writer[tensor]
            found = self.graph.roles[writer]
            if (found.start or found.inside) and not self.dropped[writer]:
                self.end[writer] = False
                if self.leader[writer] != self.leader[index]:
                    common = max(self.leader[writer], self.leader[index])
                    self.leader[writer] = self.leader[index] = common
                    changed = True
            else:
                self.dropped[index] = True
        return changed

    def _alive(self, index: int) -> bool:
        """Whether an operation other than a start is in a cluster that has not been dropped."""
        inside = self.graph.roles[index].inside or self.end[index]
        return inside and not self.dropped[self.leader[index]]

    def _drop_those_read_from_outside(self) -> None:
        compatible: Counter[Hashable] = Counter()
        alive = [i for i in range(len(self.graph.nodes)) if self._alive(i)]
        for index in alive:
            compatible.update(self.graph.nodes[index].inputs)
        for index in alive:
            for tensor in self.graph.nodes[index].inputs:
                # unequal also where one operation reads a tensor twice, as x + x does
                if compatible[tensor] != self.graph.readers[tensor]:
                    self.dropped[self.leader[index]] = True

    def _layouts(self) -> set[Hashable]:
        zeros: Counter[int] = Counter()
        parameters: Counter[int] = Counter()
        alive = [i for i in range(len(self.graph.nodes)) if self._alive(i)]
        for index in alive:
            node = self.graph.nodes[index]
            if node.pointwise:
                zeros[self.leader[index]] += node.zeros
                parameters[self.leader[index]] += node.parameters
        return {
            tensor
            for index in alive
            if 3 * zeros[self.leader[index]] > 2 * parameters[self.leader[index]]
            for tensor in self.graph.nodes[index].inputs
        }


def _leak(graph: _Graph, sparse: set[Hashable]) -> tuple[Node | None, Problem] | None:
    """The first operation that reads the layout of the sparse kernels and breaks it."""
    for node in graph.nodes:
        if not sparse.intersection(node.inputs):
            continue
        ends = all(tensor not in sparse for tensor in node.outputs)
        if node.kind == "mean":
            if set(node.axes) != _SPATIAL:
                return node, _other_axes(node)
            fits = graph.only_flattened if ends else graph.only_pointwise_read
            if node.keep_dims and not fits(node):
                return node, _KEEP_DIMS
        elif ends and node.kind != "depth_to_space":
            return node, Problem(
                "what it writes is read outside of the sparse path, in another layout",
                "End the sparse path with GlobalAveragePooling2D()",
            )
    return None


def _other_axes(node: Node) -> Problem:
    return Problem(
        f"a mean over the axes {list(node.axes)}", "Take it over height and width together"
    )


def _offences(graph: _Graph) -> Iterator[tuple[Node | None, Problem]]:
    """What a person would name as the obstacle, from the start of the network on."""
    if not any(found.start for found in graph.roles):
        yield _without_start(graph)
        return
    reached: set[Hashable] = set()
    pixels: dict[Hashable, Node] = {}  # tensors that come of a mean alone, and that mean
    ended = False
    for node, found in zip(graph.nodes, graph.roles, strict=True):
        read = reached.intersection(node.inputs)
        if not read:
            reached.update(node.outputs if found.start else ())
            continue
        means = [pixels[tensor] for tensor in node.inputs if tensor in pixels]
        single = means[0] if len(means) == len(node.inputs) else None
        problem = found.problem or _in_place(graph, node, reached)
        if problem is not None:
            yield (single, _KEEP_DIMS) if single is not None else (node, problem)
        elif found.end and (not node.keep_dims or graph.only_flattened(node)):
            ended = True
        else:
            reached.update(node.outputs)
            origin = node if node.kind == "mean" else single
            pixels.update((t, origin) for t in node.outputs if origin is not None)
    for node in graph.nodes:
        for tensor in graph.outputs.intersection(node.outputs) & reached:
            yield (pixels[tensor], _KEEP_DIMS) if tensor in pixels else (node, _AN_OUTPUT)
    if not ended:
        yield (
            None,
            Problem(
                "nothing ends the sparse path",
                "It ends with GlobalAveragePooling2D() or depth_to_space",
            ),
        )


_AN_OUTPUT = Problem(
    "an output of the model inside the sparse path",
    "Only what comes after GlobalAveragePooling2D() can be an output",
)


def _in_place(graph: _Graph, node: Node, reached: set[Hashable]) -> Problem | None:
    """What is wrong with an operation where it stands, rather than in itself."""
    if graph.roles[graph.nodes.index(node)].start:
        return Problem(
            "a second 3x3 convolution inside the sparse path", "Only its start can be one"
        )
    if node.kind == "mean" and set(node.axes) != _SPATIAL:
        return _other_axes(node)
    if len(set(node.inputs)) < len(node.inputs):
        return Problem("it reads one tensor twice", "Multiply by 2 in a layer's weights instead")
    if any(tensor not in reached for tensor in node.inputs):
        return Problem(
            "it also reads a tensor from outside of the sparse path",
            "Compute that tensor from the sparse path, without an operation that it lacks",
        )
    if node.kind == "mean" and node.keep_dims and not _well_read(graph, node):
        return Problem(
            "a mean with keepdims=True that another operation than a convolution reads",
            "Put a 1x1 convolution right behind it, as squeeze and excitation does",
        )
    return None


def _well_read(graph: _Graph, mean: Node) -> bool:
    """Whether a mean with keepdims is read as it can be, or is wrong for its end rather."""
    if set(mean.outputs).intersection(graph.outputs) or graph.only_flattened(mean):
        return True
    return graph.only_pointwise_read(mean)


def _without_start(graph: _Graph) -> tuple[Node | None, Problem]:
    for node, found in zip(graph.nodes, graph.roles, strict=True):
        if node.kind == "conv":
            problem = found.problem or Problem(
                "the first convolution is 1x1",
                "The sparse path begins with a 3x3 convolution with stride 2 and padding 1 that "
                "reads 3 channels",
            )
            return node, problem
    return None, Problem(
        "the model has no convolution that the sparse path could begin with",
        "It begins with ZeroPadding2D(1) and a 3x3 convolution with stride 2 that reads 3 channels",
    )


def _too_dense(graph: _Graph, clusters: _Clusters) -> tuple[Node | None, Problem]:
    convolutions = clusters.pointwise(taken=False)
    zeros = sum(node.zeros for node in convolutions)
    parameters = sum(node.parameters for node in convolutions)
    if not parameters:
        return None, Problem("the model has no 1x1 convolution in the sparse path", "Nothing to do")
    return None, Problem(
        f"{zeros / parameters:.1%} of the weights of its {len(convolutions)} 1x1 convolutions are "
        "zero, and XNNPACK wants more than two thirds of them together",
        "Prune them to 70 % or more",
    )
