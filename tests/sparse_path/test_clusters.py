"""XNNPACK's search on plain records, where a Keras model would be roundabout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tfprune.sparse_path import Network, Node, Window, judge, same_padding

PIXEL = Window((1, 1), (1, 1), (1, 1), (0, 0, 0, 0), 4)
STEM = Window((3, 3), (2, 2), (1, 1), (1, 1, 1, 1), 3)
CHAIN = (
    Node("conv", "stem", "Conv2D", ("in",), ("a",), window=STEM),
    Node("conv", "one", "Conv2D", ("a",), ("b",), window=PIXEL, zeros=201, parameters=300),
    Node("conv", "two", "Conv2D", ("b",), ("c",), window=PIXEL, zeros=0, parameters=1),
    Node("mean", "pool", "Mean", ("c",), ("d",), axes=(1, 2)),
    Node("dense", "head", "Dense", ("d",), ("out",), rank=2, parameters=10**6),
)


def network(
    *changes: tuple[str, dict[str, object]], outputs: tuple[str, ...] = ("out",)
) -> Network:
    nodes = {node.layer: node for node in CHAIN}
    for layer, attributes in changes:
        nodes[layer] = replace(nodes[layer], **attributes)  # type: ignore[arg-type]
    return Network(tuple(nodes.values()), frozenset(outputs))


def test_exactly_two_thirds_are_too_few() -> None:
    """201 of 301 is more than two thirds, 200 of 300 is not."""
    assert judge(network()).verdict == "sparse"
    exact = judge(network(("one", {"zeros": 200, "parameters": 299})))
    assert exact.verdict == "dense" and (exact.zeros, exact.parameters) == (200, 300)
    assert "66.7% of the weights of its 2 1x1 convolutions" in exact.reason


def test_the_head_behind_the_pool_does_not_count() -> None:
    assert judge(network()).parameters == 301


@pytest.mark.parametrize(
    ("changes", "outputs", "verdict", "layer"),
    [
        # what writes an output is dropped, what comes before is not, and writes the wrong layout
        ([], ("out", "b"), "broken", "Conv2D 'one'"),
        # nothing but the pool reads it: the pool is dropped, and with it the whole search
        ([], ("out", "c"), "dense", "Conv2D 'two'"),
        ([("pool", {"inputs": ("b",)})], ("out", "c"), "broken", "Conv2D 'two'"),
        ([("two", {"floats": False})], ("out",), "dense", "Conv2D 'two'"),
        ([("one", {"floats": False})], ("out",), "dense", "Conv2D 'one'"),
        ([("pool", {"axes": (1,)})], ("out",), "broken", "Mean 'pool'"),
        ([("pool", {"axes": (3,)})], ("out",), "broken", "Mean 'pool'"),
        ([("stem", {"inputs": ()})], ("out",), "sparse", ""),
    ],
)
def test_cuts(changes, outputs, verdict, layer) -> None:
    report = judge(network(*changes, outputs=outputs))
    assert (report.verdict, report.layer) == (verdict, layer)
    assert bool(report.reason) == (verdict != "sparse")


def test_parts_of_a_model_are_searched_alone() -> None:
    """A pool in another part than the convolutions ends nothing, and nothing breaks."""
    apart = network(("pool", {"part": 1}), ("head", {"part": 1}))
    report = judge(apart)
    assert report.verdict == "dense"


def test_same_padding() -> None:
    assert same_padding((3, 3), (1, 1), (1, 1)) == (1, 1, 1, 1)
    assert same_padding((5, 3), (1, 1), (2, 1)) == (4, 4, 1, 1)
    assert same_padding((4, 4), (1, 1), (1, 1)) == (1, 2, 1, 2)
    assert same_padding((1, 1), (2, 2), (1, 1)) == (0, 0, 0, 0)
    assert same_padding((3, 3), (2, 2), (1, 1)) is None
