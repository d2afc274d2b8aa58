"""Equal channels become one, and the outputs stay (sheet B6, step 4)."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tf_keras

from tests import toys
from tfprune.errors import ArgumentError
from tfprune.graph import analyse
from tfprune.graph.plan import PruningPlan
from tfprune.surgery import apply
from tfprune.surgery.merging import kinds, merged, obstacle, occurrences
from tfprune.testing import randomize

layers = keras.layers
# Relative to the largest output. Some float32 layers whose sums are taken in another order.
ROUNDING = 1e-5


def _paired(group, seed=0):
    """Clusters at random, about half as many as channels."""
    random = np.random.default_rng([seed, group.width])
    count = max(1, group.width // 2)
    numbers = np.r_[np.arange(count), random.integers(0, count, group.width - count)]
    return random.permutation(numbers)


def _tie(group, clusters):
    """Every channel gets all that makes and accompanies the first of its cluster."""
    first = {n: int(np.flatnonzero(clusters == n)[0]) for n in set(clusters.tolist())}
    for member in (*group.producers, *group.followers):
        value = np.moveaxis(np.asarray(member.variable).copy(), member.axis, 0)
        where = {}
        for position, channel in zip(member.positions, member.channels, strict=True):
            where.setdefault(int(channel), []).append(int(position))
        for channel, positions in where.items():
            value[positions] = value[where[first[int(clusters[channel])]]]
        member.variable.assign(np.moveaxis(value, 0, member.axis))


def _inputs(model, count=6, seed=3):
    random = np.random.default_rng(seed)
    shapes = model.input_shape if isinstance(model.input_shape, list) else [model.input_shape]
    batch = [random.standard_normal((count, *shape[1:])).astype("float32") for shape in shapes]
    return batch[0] if len(batch) == 1 else batch


def _differs(model, plan, x):
    before = np.asarray(model(x))
    after = np.asarray(apply(model, plan)(x))
    return np.abs(after - before).max() / np.abs(before).max()


def _check(model, names=None, **options):
    """With equal channels nothing changes; with others it does."""
    graph = analyse(model)
    groups = [g for g in graph.prunable if not obstacle(graph, g)]
    groups = [g for g in groups if names is None or g.name in names]
    assert groups and (names is None or len(groups) == len(names))
    clusters = {group.name: _paired(group) for group in groups}
    x = _inputs(model)
    kept, values = merged(graph, clusters, **options)
    assert _differs(model, PruningPlan.of(graph, kept, values=values), x) > 100 * ROUNDING
    for group in groups:
        _tie(group, clusters[group.name])
    kept, values = merged(graph, clusters, **options)
    plan = PruningPlan.of(graph, kept, values=values)
    assert {name: len(k) for name, k in plan.kept.items()} == {
        group.name: len(set(clusters[group.name])) for group in groups
    }
    assert _differs(model, plan, x) < ROUNDING
    # Without the sums in the readers it is another network.
    assert _differs(model, PruningPlan.of(graph, kept), x) > 100 * ROUNDING
    return plan


def _concatenating():
    """Dense connections: normalisations and readers stand behind two concatenations."""
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(6, 3, padding="same", name="stem")(inputs)
    for number in range(2):
        y = layers.ReLU()(layers.BatchNormalization(name=f"norm{number}")(x))
        y = layers.Conv2D(4, 3, padding="same", name=f"conv{number}")(y)
        x = layers.Concatenate()([x, y])
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(x), layers.GlobalMaxPooling2D()(x)])
    return randomize(keras.Model(inputs, layers.Dense(4, name="head")(x)))


def _depthwise(framework=keras):
    lib = framework.layers
    inputs = framework.Input((6, 6, 3))
    x = lib.Conv2D(8, 3, padding="same", name="first")(inputs)
    y = lib.DepthwiseConv2D(3, padding="same", depth_multiplier=2, name="depthwise")(x)
    y = lib.Conv2D(8, 1, name="back")(lib.BatchNormalization(name="norm")(y))
    x = lib.Flatten()(lib.ReLU()(lib.Add()([x, y])))
    return randomize(framework.Model(inputs, lib.Dense(4, name="head")(x)))


def _grouped():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, name="first")(inputs)
    x = layers.PReLU(shared_axes=[1, 2], name="slope")(x)
    x = layers.Conv2D(12, 3, groups=2, activation="relu", name="grouped")(x)
    x = layers.Conv2DTranspose(6, 3, name="transposed")(x)
    x = layers.SeparableConv2D(6, 3, depth_multiplier=2, name="separable")(x)
    x = layers.Permute((3, 1, 2))(x)  # channels first: a channel's rows are neighbours
    return randomize(keras.Model(inputs, layers.Dense(4, name="head")(layers.Flatten()(x))))


def _recurrent():
    inputs = keras.Input((7, 5))
    x = layers.LSTM(6, return_sequences=True, name="lstm")(inputs)
    return randomize(
        keras.Model(inputs, layers.Dense(4, name="head")(layers.GRU(6, name="gru")(x)))
    )


def _attention(framework=keras):
    inputs = framework.Input((5, 6))
    lib = framework.layers
    x = lib.Dense(8, name="in")(inputs)
    x = lib.MultiHeadAttention(4, 6, value_dim=8, name="attention")(x, x)
    return randomize(framework.Model(inputs, lib.Dense(2, name="head")(lib.Flatten()(x))))


@pytest.mark.parametrize(
    "make",
    [toys.chain, toys.residual, _concatenating, _depthwise, _grouped, _recurrent, _attention],
)
def test_equal_channels(make) -> None:
    _check(make())


@pytest.mark.parametrize("make", [_depthwise, _attention])
def test_tf_keras(make) -> None:
    _check(make(tf_keras))


def test_each_part_of_attention_by_itself() -> None:
    for name in ("attention:heads", "attention:key width", "attention:value width"):
        _check(_attention(), [name])


def test_a_nested_model_that_is_called_twice() -> None:
    inner_inputs = keras.Input((6, 6, 8))
    conv = layers.Conv2D(8, 3, padding="same", name="conv")(inner_inputs)
    inner = keras.Model(inner_inputs, conv, name="inner")
    inputs = keras.Input((6, 6, 3))
    x = inner(inner(layers.Conv2D(8, 1, name="stem")(inputs)))
    x = layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x))
    _check(randomize(keras.Model(inputs, x)))


def test_two_inputs_and_two_readers() -> None:
    first, second = keras.Input((6, 6, 3)), keras.Input((6, 6, 2))
    x = layers.Conv2D(8, 3, name="a")(first)
    y = layers.Conv2D(8, 3, name="b")(second)
    x = layers.Multiply()([layers.ReLU()(x), y])
    y = layers.Conv2D(5, 1, name="reader")(x)
    x = layers.Concatenate()([layers.Flatten()(x), layers.GlobalMaxPooling2D()(y)])
    _check(randomize(keras.Model([first, second], layers.Dense(3, name="head")(x))))


def test_clusters_of_one_change_nothing() -> None:
    graph = analyse(toys.residual())
    kept, values = merged(graph, {g.name: np.arange(g.width) for g in graph.prunable}, average=True)
    assert values == {} and PruningPlan.of(graph, kept).kept == {}
    assert merged(graph, {}) == ({}, {})


def test_by_hand() -> None:
    """Two dense layers: the rows of a cluster are summed, the columns are taken or averaged."""
    inputs = keras.Input((2,))
    x = layers.Dense(4, name="hidden")(inputs)
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    graph = analyse(model)
    first, bias = np.arange(8.0).reshape(2, 4), np.array([1.0, 2, 4, 8])
    second = np.array([[1.0, 2, 3], [10, 20, 30], [100, 200, 300], [1000, 2000, 3000]])
    model.get_layer("hidden").set_weights([first, bias])
    model.get_layer("head").set_weights([second, np.zeros(3)])

    kept, values = merged(graph, {"hidden": np.array([7, 3, 7, 3])})
    assert kept["hidden"].tolist() == [0, 1] and set(values) == {"head/kernel"}
    np.testing.assert_array_equal(values["head/kernel"], [[101, 202, 303], [1010, 2020, 3030]])

    kept, values = merged(
        graph, {"hidden": np.array([0, 1, 0, -1])}, kept={"hidden": [1, 2]},
        factors={"hidden": np.array([0.5, 1, 1, 9])},
    )  # fmt: skip
    assert kept["hidden"].tolist() == [1, 2] and set(values) == {"head/kernel"}
    np.testing.assert_array_equal(values["head/kernel"], [[10, 20, 30], [100.5, 201, 301.5]])

    _, values = merged(graph, {"hidden": np.array([0, 1, 0, 1])}, average=True)
    np.testing.assert_array_equal(values["hidden/kernel"], [[1, 2], [5, 6]])
    np.testing.assert_array_equal(values["hidden/bias"], [2.5, 5])


def test_flatten_sums_matching_row_blocks() -> None:
    """Sheet B6, step 4: the rows of channel k are k + i C."""
    inputs = keras.Input((2, 3, 2))
    x = layers.Flatten()(layers.Conv2D(4, 1, name="conv")(inputs))
    model = keras.Model(inputs, layers.Dense(1, use_bias=False, name="head")(x))
    rows = np.arange(24.0).reshape(24, 1) ** 2
    model.get_layer("head").set_weights([rows])
    _, values = merged(analyse(model), {"conv": np.array([0, 1, 1, 0])})
    expected = [[rows[4 * i, 0] + rows[4 * i + 3, 0], rows[4 * i + 1, 0] + rows[4 * i + 2, 0]]
                for i in range(6)]  # fmt: skip
    np.testing.assert_array_equal(values["head/kernel"][:, 0], np.ravel(expected))


@pytest.mark.parametrize("make", [toys.residual, _concatenating, _attention])
def test_the_mean_is_exact_for_the_model_with_means(make) -> None:
    """Merging nearly equal channels = putting every channel's cluster mean in, then merging."""
    model = make()
    graph = analyse(model)
    clusters = {g.name: _paired(g) for g in graph.prunable}
    kept, values = merged(graph, clusters, average=True)
    small = apply(model, PruningPlan.of(graph, kept, values=values))
    for group in graph.prunable:
        numbers = clusters[group.name]
        for member in (*group.producers, *group.followers):
            value = np.moveaxis(np.asarray(member.variable).copy(), member.axis, 0)
            rows = {c: member.positions[member.channels == c] for c in range(group.width)}
            for number in set(numbers.tolist()):
                of = [rows[c] for c in np.flatnonzero(numbers == number)]
                mean = np.mean([value[r] for r in of], axis=0)
                for r in of:
                    value[r] = mean
            member.variable.assign(np.moveaxis(value, 0, member.axis))
    x = _inputs(model)
    before = np.asarray(model(x))
    np.testing.assert_allclose(
        np.asarray(small(x)), before, rtol=0, atol=ROUNDING * np.abs(before).max()
    )


def test_multiples() -> None:
    """A filter that is twice another's, behind ReLU: its slice counts twice."""
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, activation="relu", name="conv")(inputs)
    x = layers.GlobalAveragePooling2D()(x)
    model = randomize(keras.Model(inputs, layers.Dense(3, name="head")(x)))
    kernel, bias = (w.copy() for w in model.get_layer("conv").get_weights())
    kernel[..., 2], bias[2] = 2 * kernel[..., 1], 2 * bias[1]
    model.get_layer("conv").set_weights([kernel, bias])
    graph = analyse(model)
    clusters = {"conv": np.array([0, 1, 1, 2])}
    kept, values = merged(graph, clusters, factors={"conv": np.array([1, 1, 2.0, 1])})
    x = toys.images(size=6)
    assert _differs(model, PruningPlan.of(graph, kept, values=values), x) < ROUNDING
    kept, values = merged(graph, clusters)
    assert _differs(model, PruningPlan.of(graph, kept, values=values), x) > 100 * ROUNDING


@pytest.mark.parametrize("norm", [layers.LayerNormalization, layers.RMSNormalization])
def test_statistics_across_channels_are_refused(norm) -> None:
    inputs = keras.Input((6, 6, 3))
    x = norm(name="norm")(layers.Conv2D(8, 1, name="conv")(inputs))
    model = keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))
    graph = analyse(model)
    assert "statistics" in obstacle(graph, graph["conv"])
    with pytest.raises(ArgumentError, match="norm\\) takes statistics across"):
        merged(graph, {"conv": np.zeros(8, int)})
    merged(graph, {"conv": np.arange(8)})


def test_channels_that_go_different_ways_are_refused() -> None:
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 1, name="conv")(inputs)
    first, second = keras.ops.split(x, 2, axis=-1)
    x = layers.Concatenate()([layers.MaxPooling2D(2)(first), layers.AveragePooling2D(2)(second)])
    model = randomize(keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x))))
    graph = analyse(model)
    ids = graph["conv"].channel_ids
    assert len(set(kinds(graph)[ids[:4]])) == 1 and len(set(kinds(graph)[ids])) == 2
    with pytest.raises(ArgumentError, match="channels 4 and 0 go different ways"):
        merged(graph, {"conv": np.array([0, 1, 2, 3, 0, 4, 5, 6])})
    numbers = np.array([0, 1, 0, 1, 2, 3, 3, 2])
    _tie(graph["conv"], numbers)
    kept, values = merged(graph, {"conv": numbers})
    x = toys.images(size=6)
    assert _differs(model, PruningPlan.of(graph, kept, values=values), x) < ROUNDING


def test_constants_tell_channels_apart() -> None:
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 1, name="conv")(inputs)
    x = keras.ops.multiply(x, np.array([1, 2, 1, 2], "float32"))
    model = keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))
    graph = analyse(model)
    merged(graph, {"conv": np.array([0, 1, 0, 1])})
    with pytest.raises(ArgumentError, match="another constant"):
        merged(graph, {"conv": np.array([0, 0, 1, 1])})


def test_given_and_adapted_statistics() -> None:
    """Those in a configuration may differ; those of data are arrays outside of any weight."""
    for adapted in (False, True):
        given = {} if adapted else {"mean": np.arange(8.0), "variance": np.ones(8)}
        norm = layers.Normalization(name="norm", **given)
        if adapted:
            norm.adapt(np.random.default_rng(0).standard_normal((20, 8)).astype("float32"))
        inputs = keras.Input((6, 6, 3))
        x = norm(layers.Conv2D(8, 1, name="conv")(inputs))
        model = keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))
        with pytest.raises(ArgumentError, match="makes from its" if adapted else "another const"):
            merged(analyse(model), {"conv": np.arange(8) // 2})


def test_tied_embeddings_are_refused() -> None:
    """The same axis of one weight makes the channels and reads them."""
    words = layers.ReversibleEmbedding(10, 6, name="words")
    inputs = keras.Input((4,), dtype="int32")
    x = words(inputs)
    x = words(layers.Add()([x, layers.Dense(6, name="dense")(x)]), reverse=True)
    graph = analyse(keras.Model(inputs, x))
    assert obstacle(graph, graph["words"]).endswith("axis 1 makes the channels and reads them")


@pytest.mark.parametrize(
    ("clusters", "kept", "message"),
    [
        ({"conv9": [0]}, None, "'conv9', which is none"),
        ({"conv0": [0, 1]}, None, "8 channels of 'conv0'. Received: shape"),
        ({"conv0": np.zeros(8)}, None, "whole numbers"),
        ({"head": np.zeros(5, int)}, None, "Group 'head'"),
        ({"conv0": np.arange(8) // 2}, {"conv0": [0, 1, 4, 6]}, "exactly one channel of each"),
        ({"conv0": np.arange(8) // 2}, {"conv0": [0, 2, 4]}, "exactly one channel of each"),
        ({"conv0": np.full(8, -1)}, None, "exactly one channel of each"),
        ({"conv0": np.arange(8)}, {"conv1": [0]}, "'conv1', for which there are none"),
    ],
)  # fmt: skip
def test_bad_input(clusters, kept, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        merged(analyse(toys.chain()), clusters, kept=kept)


def test_occurrences() -> None:
    assert occurrences(np.array([4, 2, 4, 4, 2, 7])).tolist() == [0, 0, 1, 2, 1, 0]
