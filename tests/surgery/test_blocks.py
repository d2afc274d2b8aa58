"""Blocks removed for real: masked equals pruned, costs foretold, and nothing else changed."""

import keras
import numpy as np
import pytest
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

import tfprune
from tests import toys
from tests.graph.oracle import TOLERANCE, randomise
from tfprune import zoo
from tfprune.cost import CostModel, measure
from tfprune.graph.blocks import blocks_of
from tfprune.graph.plan import PruningPlan
from tfprune.graph.trace import node_counts
from tfprune.testing import random_plan, randomize

layers = keras.layers

# Relative: float32 sums in another order over twenty layers of some hundred terms.
DEEP = 1e-4


def names_of(model):
    return [block.name for block in blocks_of(tfprune.analyse(model))]


def proven(model, blocks, kept=None, tolerance=TOLERANCE):
    """Applies a plan, proves it, and compares the costs foretold with those of the result."""
    graph = tfprune.analyse(model)
    plan = PruningPlan.of(graph, kept or {}, blocks=blocks)
    before = [np.asarray(v).copy() for v in model.variables]
    names, nodes = [layer.name for layer in model.layers], node_counts(model)
    small = plan.apply(model)
    result = tfprune.verify(model, plan, pruned=small, tolerance=tolerance)
    assert result, str(result)
    assert result.magnitude > 0
    foretold, received = measure(graph, plan), measure(small)
    for name in ("parameters", "trainable_parameters", "size_bytes", "macs", "activation_bytes"):
        assert getattr(foretold, name) == getattr(received, name), name
    assert received.parameters == small.count_params()
    there = {layer.path for layer in received.layers}
    for layer in foretold.layers:
        if layer.path not in there:
            assert (layer.parameters, layer.macs, layer.activation_bytes) == (0, 0, 0)
    # The source is as it was.
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, np.asarray(new))
    assert [layer.name for layer in model.layers] == names
    assert node_counts(model) == nodes
    return small


@pytest.fixture(scope="module", params=["A", "B", "pre"])
def network(request):
    build = {
        "A": lambda: zoo.resnet_cifar(20, shortcut="A", widths=(4, 6, 8), seed=0),
        "B": lambda: zoo.resnet_cifar(20, shortcut="B", widths=(4, 6, 8), seed=0),
        "pre": lambda: zoo.preresnet_cifar(29, widths=(2, 3, 4), seed=0),
    }
    return randomize(build[request.param]())


@pytest.mark.parametrize("which", ["first", "all", "others", "projected"])
def test_residual_networks(network, which):
    names = names_of(network)
    blocks = {
        "first": names[:1],
        "all": names,
        "others": names[1::2],
        "projected": [name for name in names if "stage2_block1" in name],
    }[which]
    small = proven(network, blocks, tolerance=DEEP)
    # Of a block that goes the shortcut alone is left.
    gone = tuple(f"{name.removesuffix('_add')}_" for name in blocks)
    left = [layer.name for layer in small.layers if layer.name.startswith(gone) and layer.weights]
    assert all("projection" in name or "shortcut" in name for name in left), left
    assert len(small.layers) < len(network.layers)


def test_blocks_and_channels_together(network):
    kept = random_plan(network, seed=1).kept
    assert kept
    small = proven(network, names_of(network)[::2], kept, tolerance=DEEP)
    assert small.count_params() < proven(network, names_of(network)[::2]).count_params()


def test_the_oracle_can_fail(network):
    graph, names = tfprune.analyse(network), names_of(network)
    plans = [PruningPlan.of(graph, {}, blocks=[name]) for name in names[1:3]]
    assert not tfprune.verify(network, plans[0], pruned=plans[1].apply(network))
    assert not tfprune.verify(network, plans[0], pruned=network)


@pytest.fixture(scope="module")
def resnet50():
    return zoo.preresnet50(seed=0)


# Sheet A5, "resulting networks": structure, parameters, MACs.
STRUCTURES = [
    ((3, 4, 6, 3), (True, True, True, True), 25_549_480, 4_089_184_256),
    ((0, 4, 6, 3), (False, True, True, True), 25_351_080, 3_472_621_568),
    ((1, 4, 4, 1), (False, True, True, True), 14_261_928, 2_817_523_712),
    ((0, 4, 4, 2), (False, True, True, True), 18_654_120, 2_817_523_712),
    ((0, 2, 5, 1), (False, False, False, True), 14_915_496, 2_278_031_360),
    ((0, 1, 6, 1), (False, False, True, True), 15_619_496, 2_329_411_584),
]


def removed_for(counts, first_branch, whole=(3, 4, 6, 3)):
    """The blocks that go for so many in each stage."""
    blocks = []
    for stage, (count, first, total) in enumerate(
        zip(counts, first_branch, whole, strict=True), start=1
    ):
        kept = range(1, count + 1) if first else range(2, count + 2)
        blocks += [f"stage{stage}_block{i}_add" for i in range(1, total + 1) if i not in kept]
    return blocks


@pytest.mark.parametrize(("counts", "first", "parameters", "macs"), STRUCTURES)
def test_structures_of_sss(resnet50, counts, first, parameters, macs):
    """Sheet A5: ResNet-50 without blocks is ResNet-41, -32 and -26."""
    graph = tfprune.analyse(resnet50)
    cost = measure(graph, PruningPlan.of(graph, {}, blocks=removed_for(counts, first)))
    assert (cost.trainable_parameters, cost.macs) == (parameters, macs)


def test_the_rebuilt_network_is_the_builders(resnet50):
    """Sheet A5: the smallest structure, as it is rebuilt and as the zoo builds it."""
    counts, first, parameters, macs = STRUCTURES[4]
    plan = PruningPlan.of(tfprune.analyse(resnet50), {}, blocks=removed_for(counts, first))
    small = plan.apply(resnet50)
    cost = measure(small)
    assert (cost.trainable_parameters, cost.macs) == (parameters, macs)
    built = zoo.preresnet50(counts, first_branch=first)
    shapes = [sorted(tuple(w.shape) for w in model.weights) for model in (small, built)]
    assert shapes[0] == shapes[1]


# -- nested, shared, several -------------------------------------------------------------------


def sums_of_several(framework=keras):
    kinds = framework.layers
    inputs = framework.Input((6,))
    x = kinds.Dense(5, name="stem")(inputs)
    h = kinds.Activation("tanh", name="active")(kinds.BatchNormalization(name="norm")(x))
    branches = [kinds.Dense(5, name=f"branch{i}")(h) for i in range(2)]
    x = kinds.Add(name="sum")([branches[0], x, branches[1]])
    return framework.Model(inputs, kinds.Dense(3, name="head")(x))


@pytest.mark.parametrize("framework", [keras, tf_keras])
@pytest.mark.parametrize("blocks", [["sum"], ["sum#2"], ["sum", "sum#2"]], ids=["1", "2", "both"])
def test_sums_of_several(framework, blocks):
    model = sums_of_several(framework)
    randomise(model)
    small = proven(model, blocks)
    there = {layer.name for layer in small.layers}
    assert ("norm" in there) == ("sum" in there) == (len(blocks) == 1)


def shared_activation():
    """One ReLU for the branch and for the rest, which costs memory per call."""
    relu = layers.ReLU(name="relu")
    inputs = keras.Input((6, 6, 3))
    x = relu(layers.Conv2D(8, 3, padding="same", name="stem")(inputs))
    y = layers.Conv2D(8, 3, padding="same", name="b")(relu(layers.Conv2D(4, 1, name="a")(x)))
    x = relu(layers.Add(name="sum")([x, relu(y)]))
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def nested(framework=keras, outer=False):
    kinds = framework.layers
    block_input = framework.Input((6,))
    y = kinds.Dense(6, name="b")(kinds.Dense(4, activation="tanh", name="a")(block_input))
    inner = framework.Model(block_input, kinds.Add(name="sum")([block_input, y]), name="inner")
    inputs = framework.Input((6,))
    x = kinds.Dense(6, name="stem")(inputs)
    x = kinds.Add(name="outer")([x, inner(x)]) if outer else inner(inner(x))
    return framework.Model(inputs, kinds.Dense(2, name="head")(x))


def around_the_inputs():
    """A block that reads an input and makes an output."""
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Add(name="sum")([inputs, layers.Dense(6)(inputs)]))


def operators(framework=keras):
    kinds = framework.layers
    inputs = framework.Input((6,))
    x = kinds.Dense(6)(inputs)
    x = kinds.Dense(6)(kinds.ReLU()(x)) + x
    x = x + kinds.Dense(6)(kinds.Dense(3)(x))
    return framework.Model(inputs, kinds.Dense(2)(x))


def transformer():
    inputs = keras.Input((5, 8))
    x = layers.Dense(8, name="embed")(inputs)
    y = layers.LayerNormalization(name="norm1")(x)
    x = layers.Add(name="sum1")([x, layers.MultiHeadAttention(2, 4, name="attention")(y, y)])
    y = layers.LayerNormalization(name="norm2")(x)
    y = layers.Dense(8, name="down")(layers.Dense(16, activation="gelu", name="up")(y))
    return keras.Model(inputs, layers.Dense(2, name="head")(layers.Add(name="sum2")([x, y])))


@pytest.mark.parametrize(
    "build",
    [
        shared_activation,
        nested,
        lambda: nested(tf_keras),
        lambda: nested(outer=True),
        around_the_inputs,
        operators,
        lambda: operators(tf_keras),
        transformer,
        toys.residual,
    ],
    ids=["shared", "nested", "nested tf_keras", "nested branch", "around the inputs", "operators",
         "operators tf_keras", "transformer", "toy"],
)  # fmt: skip
def test_every_set_of_blocks(build):
    model = build()
    randomise(model)
    names = names_of(model)
    assert names
    kept = random_plan(model).kept
    for blocks in [*([name] for name in names), names]:
        small = proven(model, blocks)
        assert small.count_params() < model.count_params()
        proven(model, blocks, kept)


def test_costs_for_a_mask():
    graph = tfprune.analyse(toys.residual())
    whole, costs = CostModel(graph), CostModel(graph, ["sum"])
    full = whole.full_mask()
    plan = PruningPlan.of(graph, {}, blocks=["sum"])
    left = measure(plan.apply(toys.residual()))
    assert costs.macs(full) == left.macs < whole.macs(full)
    assert costs.parameters(full) == left.parameters < whole.parameters(full)
    assert costs.size_bytes(full) == left.size_bytes < whole.size_bytes(full)
    smooth = costs.posynomial("macs", graph.prunable)
    assert round(smooth(np.ones(len(graph.prunable)))) == left.macs
    assert costs.share_of_macs()["expand"] == 0


def test_trainable_flags():
    """Layers are matched by what was made of them, not by their place in the model."""
    model = zoo.preresnet_cifar(20, widths=(2, 3, 4), seed=0)
    frozen = {"stage1_block1_projection_conv", "stage2_block2_2_conv", "classifier", "stem_conv"}
    for name in frozen:
        model.get_layer(name).trainable = False
    blocks = [name for name in names_of(model) if "block1" in name]
    small = proven(model, blocks, tolerance=DEEP)
    assert {layer.name for layer in small.layers if not layer.trainable} == frozen


def test_the_result_is_an_ordinary_model(tmp_path):
    model = zoo.preresnet_cifar(20, widths=(2, 3, 4), seed=0)
    model.compile("sgd", "mse")
    small = PruningPlan.of(tfprune.analyse(model), {}, blocks=names_of(model)[:2]).apply(model)
    assert small.compiled
    small.save(tmp_path / "small.keras")
    x = toys.images(2, size=32)
    loaded = keras.models.load_model(tmp_path / "small.keras")
    np.testing.assert_array_equal(np.asarray(loaded(x)), np.asarray(small(x)))
    # and it can be pruned on
    proven(small, names_of(small)[:1], random_plan(small).kept, tolerance=DEEP)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_generated(data):
    """Towers of residual blocks of any kind, any of them removed, with or without channels."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 5, 3))
    width = data.draw(st.integers(2, 4))
    x = layers.Conv2D(width, 1)(inputs)
    for number in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["plain", "projected", "operator", "two", "pooled"]))
        y = layers.Conv2D(data.draw(st.integers(1, 4)), 3, padding="same", activation="relu")(x)
        if kind == "projected":
            width += 1
            x = layers.Conv2D(width, 1)(x)
        branches = [layers.Conv2D(width, 1)(y) for _ in range(2 if kind == "two" else 1)]
        if kind == "pooled":
            x = layers.AveragePooling2D(3, 1, padding="same")(x)
        if kind == "operator":
            x = branches[0] + x
        else:
            order = data.draw(st.permutations([x, *branches]))
            x = layers.Add(name=f"sum{number}")(order)
    model = keras.Model(inputs, layers.Dense(2)(layers.Flatten()(x)))
    randomise(model)
    names = names_of(model)
    blocks = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names)))
    kept = random_plan(model).kept if data.draw(st.booleans()) else {}
    proven(model, blocks, kept)
