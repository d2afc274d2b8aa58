"""Blocks: where they are, where there are none, and plans that remove them."""

import json

import keras
import numpy as np
import pytest
import tf_keras

import tfprune
from tests import toys
from tfprune import zoo
from tfprune.graph.blocks import blocks_of, calls_of, removal
from tfprune.graph.masking import MaskedModel
from tfprune.graph.plan import PruningPlan

layers = keras.layers


def found(model):
    """Name, operand and layers of every block."""
    return [(b.name, b.operand, b.layers) for b in blocks_of(tfprune.analyse(model))]


def unnamed(framework=keras):
    """Two blocks without names, their additions an operator and a layer."""
    kinds = framework.layers
    inputs = framework.Input((6, 6, 3))
    x = kinds.Conv2D(8, 3, padding="same")(inputs)
    x = x + kinds.Conv2D(8, 3, padding="same")(kinds.ReLU()(x))
    y = kinds.Conv2D(8, 3, padding="same")(kinds.Conv2D(6, 1, activation="relu")(x))
    x = kinds.Add()([y, x])
    return framework.Model(inputs, kinds.Dense(3)(kinds.GlobalAveragePooling2D()(x)))


# -- where blocks are --------------------------------------------------------------------------


def test_a_residual_block():
    (block,) = blocks_of(tfprune.analyse(toys.residual()))
    assert (block.name, block.path, block.operand, block.last) == ("sum", "sum", 1, "project")
    weighted = {"expand", "depthwise", "squeeze", "excite", "project"}
    assert weighted | {"gated"} <= set(block.layers)
    assert not {"stem", "sum", "head"} & set(block.layers)


@pytest.mark.parametrize("framework", [keras, tf_keras])
def test_operators_and_layers(framework):
    first, second = found(unnamed(framework))
    assert first[1] == 1
    assert second[1] == 0
    assert len(first[2]) == len(second[2]) == 2


@pytest.mark.parametrize("first", [True, False])
def test_a_projection_is_the_shortcut(first):
    """Whichever operand it is, and although the branch could do without it."""
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, name="stem")(inputs)
    y = layers.Conv2D(8, 1, name="b")(layers.Conv2D(2, 1, name="a")(x))
    x = layers.Conv2D(8, 1, name="projection")(x)
    x = layers.Add(name="sum")([x, y] if first else [y, x])
    assert found(keras.Model(inputs, x)) == [("sum", int(first), ("a", "b"))]


def test_sums_of_several():
    inputs = keras.Input((6,))
    x = layers.Dense(5, name="stem")(inputs)
    h = layers.BatchNormalization(name="norm")(x)
    branches = [layers.Dense(5, name=f"branch{i}")(h) for i in range(2)]
    model = keras.Model(inputs, layers.Add(name="sum")([branches[0], x, branches[1]]))
    assert found(model) == [("sum", 0, ("branch0",)), ("sum#2", 2, ("branch1",))]
    # What both read goes with the second of them.
    graph = tfprune.analyse(model)
    gone = {path for path, _, gone in calls_of(graph, removal(graph, ["sum", "sum#2"])) if gone}
    assert gone == {"norm", "branch0", "branch1", "sum"}
    gone = {path for path, _, gone in calls_of(graph, removal(graph, ["sum#2"])) if gone}
    assert gone == {"branch1"}


def test_blocks_in_blocks():
    inputs = keras.Input((6,))
    outer = layers.Dense(6, name="outer")(inputs)
    inner = layers.Dense(6, name="inner")(outer)
    y = layers.Dense(6, name="last")(layers.Add(name="small")([outer, inner]))
    model = keras.Model(inputs, layers.Add(name="large")([inputs, y]))
    assert found(model) == [
        ("small", 1, ("inner",)),
        ("large", 1, ("outer", "inner", "small", "last")),
    ]


def test_nested_models():
    block_input = keras.Input((6,))
    y = layers.Dense(6, name="b")(layers.Dense(4, name="a")(block_input))
    inner = keras.Model(block_input, layers.Add(name="sum")([block_input, y]), name="inner")
    inputs = keras.Input((6,))
    twice = keras.Model(inputs, inner(inner(layers.Dense(6, name="stem")(inputs))))
    assert found(twice) == [("inner/sum", 1, ("inner/a", "inner/b"))]
    # The nested model is a branch itself, of an outer addition.
    around = keras.Model(inputs, layers.Add(name="outer")([inputs, inner(inputs)]))
    inside, outside = found(around)
    assert inside[0] == "inner/sum"
    assert outside == ("outer", 1, ("inner/a", "inner/b", "inner/sum", "inner"))


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (lambda: zoo.resnet_cifar(20, shortcut="A"), 9),
        (lambda: zoo.resnet_cifar(20, shortcut="B"), 9),
        (lambda: zoo.preresnet_cifar(20), 6),
        (lambda: zoo.densenet_cifar(13), 0),
        (toys.chain, 0),
        (lambda: keras.Sequential([keras.Input((3,)), layers.Dense(4), layers.Dense(2)]), 0),
    ],
)
def test_how_many(model, count):
    assert len(found(model())) == count


# -- where there are none ----------------------------------------------------------------------


def shared_layer():
    """The branch has no layer of its own."""
    inputs = keras.Input((6,))
    shared = layers.Dense(6)
    x = shared(inputs)
    return keras.Model(inputs, layers.Add()([x, shared(x)]))


def two_readers():
    """The branch is read elsewhere, too."""
    inputs = keras.Input((6,))
    y = layers.Dense(6)(inputs)
    return keras.Model(inputs, layers.Concatenate()([layers.Add()([inputs, y]), y]))


def is_an_output():
    inputs = keras.Input((6,))
    y = layers.Dense(6)(inputs)
    return keras.Model(inputs, [layers.Add()([inputs, y]), y])


def without_weights():
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Add()([inputs, layers.ReLU()(inputs)]))


def reads_an_input_alone():
    first, second = keras.Input((6,)), keras.Input((6,))
    return keras.Model([first, second], layers.Add()([first, layers.Dense(6)(second)]))


def shortcut_is_broadcast():
    inputs = keras.Input((6, 6, 3))
    y = layers.Conv2D(3, 1)(inputs)
    return keras.Model(inputs, y + layers.GlobalAveragePooling2D(keepdims=True)(inputs))


def shortcut_is_cast():
    inputs = keras.Input((6,), dtype="float32")
    y = layers.Dense(6, dtype="mixed_bfloat16")(inputs)
    return keras.Model(inputs, layers.Add(dtype="mixed_bfloat16")([inputs, y]))


def twice_itself():
    inputs = keras.Input((6,))
    y = layers.Dense(6)(inputs)
    return keras.Model(inputs, layers.Add()([y, y]))


def multiplied():
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.Multiply()([inputs, layers.Dense(6)(inputs)]))


@pytest.mark.parametrize(
    "model",
    [shared_layer, two_readers, is_an_output, without_weights, reads_an_input_alone,
     shortcut_is_broadcast, shortcut_is_cast, twice_itself, multiplied],
)  # fmt: skip
def test_no_blocks(model):
    assert found(model()) == []


# -- plans -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return toys.residual()


@pytest.fixture(scope="module")
def plan(model):
    return PruningPlan.of(tfprune.analyse(model), {"stem": range(12)}, blocks=["sum"])


def test_round_trip(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["version"] == 3
    loaded = PruningPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.blocks == ("sum",)


def test_equality_and_notes(plan, model):
    graph = tfprune.analyse(model)
    assert plan != PruningPlan.of(graph, plan.kept)
    assert plan.noted({"because": "of it"}).blocks == ("sum",)
    assert plan.with_values(graph, {"head/bias": np.zeros(5)}).blocks == ("sum",)


def test_it_is_printed(plan, model):
    assert "1 block goes" in str(plan)
    assert "block removed" in str(plan)
    alone = str(PruningPlan.of(tfprune.analyse(model), {}, {"why": "a test"}, blocks=["sum"]))
    assert "0 groups lose 0 of 0 channels; 1 block goes\nwhy: a test" in alone
    assert "block" not in str(PruningPlan.of(tfprune.analyse(model), plan.kept))


def test_without_blocks_the_version_is_the_old_one(model, tmp_path):
    PruningPlan.of(tfprune.analyse(model), {"stem": range(12)}).save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["version"] == 1
    assert "blocks" not in document


def test_both_extras_at_once(model, tmp_path):
    values = {"head/bias": np.arange(5.0)}
    plan = PruningPlan.of(tfprune.analyse(model), {}, values=values, blocks=["sum"])
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": "sum"}, "damaged: ValueError: expected a list"),
        ({"blocks": [3]}, "damaged: ValueError: expected a name"),
        ({"blocks": ["some"]}, "'some'. The model has 'sum'"),
        ({"blocks": ["sum", "sum"]}, "2 times"),
        ({"version": 2}, "came with version 3"),
        ({"version": 4}, "version 4"),
    ],
)
def test_damaged_files(plan, model, tmp_path, change, message):
    plan.save(tmp_path / "plan.json")
    document = {**json.loads((tmp_path / "plan.json").read_text()), **change}
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(tfprune.TfpruneError, match=message):
        PruningPlan.load(tmp_path / "plan.json").for_graph(tfprune.analyse(model))


def test_what_is_refused(model):
    graph = tfprune.analyse(model)
    for blocks, message in [
        ("sum", "a list of names"),
        (["stem"], "blocks that can be removed"),
        (["sum", "sum"], "every block once"),
    ]:
        with pytest.raises(tfprune.TfpruneError, match=message):
            PruningPlan.of(graph, {}, blocks=blocks)
    with pytest.raises(tfprune.TfpruneError, match="goes with a removed block"):
        PruningPlan.of(graph, {}, values={"expand/bias": np.zeros(24)}, blocks=["sum"])
    with pytest.raises(tfprune.TfpruneError, match="The model has none"):
        PruningPlan.of(tfprune.analyse(toys.chain()), {}, blocks=["sum"])


def test_inputs_keep_a_reader():
    """Either branch alone may go, but not both: the second input would be read by nobody."""
    first, second = keras.Input((6,)), keras.Input((6,))
    branches = [layers.Dense(6)(second) for _ in range(2)]
    model = keras.Model([first, second], layers.Add(name="sum")([first, *branches]))
    graph = tfprune.analyse(model)
    for name in ("sum", "sum#2"):
        assert PruningPlan.of(graph, {}, blocks=[name]).apply(model).count_params() == 42
    with pytest.raises(tfprune.TfpruneError, match="a reader"):
        PruningPlan.of(graph, {}, blocks=["sum", "sum#2"])


@pytest.mark.parametrize("framework", [keras, tf_keras])
def test_names_that_keras_numbered(framework):
    """In the order of the model, and by position, as channel groups are found."""
    first, second = unnamed(framework), unnamed(framework)
    graphs = [tfprune.analyse(model) for model in (first, second)]
    names = [[block.name for block in blocks_of(graph)] for graph in graphs]
    assert set(names[0]) != set(names[1])
    plan = PruningPlan.of(graphs[0], {}, blocks=names[0][::-1])
    assert plan.blocks == tuple(names[0])
    assert plan.for_graph(graphs[1]).blocks == tuple(names[1])
    assert PruningPlan.of(graphs[0], {}, blocks=names[0][1:]).for_graph(graphs[1]).blocks == (
        names[1][1],
    )


@pytest.mark.parametrize("framework", [keras, tf_keras])
def test_masked_models_leave_blocks_out(framework):
    model = unnamed(framework)
    graph = tfprune.analyse(model)
    names = [block.name for block in blocks_of(graph)]
    masked = MaskedModel(graph)
    x = toys.images(3, size=6)
    whole = np.asarray(model(x))
    for blocks in (names[:1], names[1:], names):
        masked.mask({}, blocks=blocks)
        small = PruningPlan.of(graph, {}, blocks=blocks).apply(model)
        # Some hundred float32 additions of numbers near one.
        np.testing.assert_allclose(masked.outputs([x])[0], np.asarray(small(x)), atol=2e-5)
        assert np.abs(masked.outputs([x])[0] - whole).max() > 1e-3
    masked.mask({})
    np.testing.assert_allclose(masked.outputs([x])[0], whole, atol=2e-5)
