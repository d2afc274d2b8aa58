"""NISP: infinite feature selection, and scores handed down against explicit Jacobians."""

import keras
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

import tfprune
from tests import toys
from tfprune.criteria import L1, Quota
from tfprune.criteria.feature_ranking import adjacency, infinite_feature_selection
from tfprune.criteria.nisp import NISP, Scaled, classifiers
from tfprune.criteria.score_propagation import kind_of, way_back
from tfprune.errors import ArgumentError, DataError, ModelError
from tfprune.graph.trace import trace
from tfprune.testing import check_criterion, randomize

layers = keras.layers
DATA = toys.images()
NONE = np.zeros(0, np.int64)


# -- infinite feature selection ------------------------------------------------------------------


def table(seed=0, examples=40, features=6):
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(features, features)) + np.eye(features)
    return random.normal(size=(examples, features)) @ mixing


def test_selection_is_the_sum_over_all_paths():
    values = table()
    edges = adjacency(values, 0.5)
    step = 0.9 / np.abs(np.linalg.eigvals(edges)).max() * edges
    term, total = np.ones(6), np.zeros(6)
    for _ in range(400):  # 0.9^400 is far below rounding
        term = step @ term
        total += term
    np.testing.assert_allclose(infinite_feature_selection(values), total, rtol=1e-9)


@given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_edges_by_definition(seed, alpha, rounded):
    values = table(seed, features=4)
    values = np.round(values) if rounded else values  # ties share their mean rank
    spread = values.std(0) / values.std(0).max()
    found = adjacency(values, alpha)
    for i in range(4):
        for j in range(4):
            rho = scipy.stats.spearmanr(values[:, i], values[:, j])[0]
            expected = alpha * max(spread[i], spread[j]) + (1 - alpha) * (1 - abs(rho))
            assert found[i, j] == pytest.approx(expected, abs=1e-12)


def test_many_features_by_iteration():
    values = table(1, 60, 30)
    many = np.concatenate([values] * 18, 1)  # more than are solved for all eigenvalues
    many += 1e-3 * np.random.default_rng(0).normal(size=many.shape)
    edges = adjacency(many, 0.5)
    radius = np.linalg.eigvalsh(edges)[-1]
    expected = np.linalg.solve(np.eye(540) - 0.9 / radius * edges, np.ones(540)) - 1
    np.testing.assert_allclose(infinite_feature_selection(many), expected, rtol=1e-6)


def test_a_repeated_feature_is_worth_no_more_than_a_unique_one():
    """Sheet B2, own test (v): same spread, one with a duplicate."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        values = random.normal(size=(200, 5))
        values = (values - values.mean(0)) / values.std(0)
        values = np.concatenate([values, values[:, :1]], 1)
        scores = infinite_feature_selection(values)
        assert scores[0] == pytest.approx(scores[5], rel=1e-12)
        assert scores[0] < scores[1:5].min()


def test_features_that_never_change():
    values = table()
    expected = infinite_feature_selection(values)
    wider = np.insert(values, 2, 3.0, axis=1)
    found = infinite_feature_selection(wider)
    assert found[2] == 0
    np.testing.assert_array_equal(np.delete(found, 2), expected)
    np.testing.assert_array_equal(infinite_feature_selection(np.ones((5, 3))), np.zeros(3))
    # Nothing tells copies apart.
    np.testing.assert_array_equal(
        infinite_feature_selection(np.repeat(values[:, :1], 3, 1), alpha=0), np.ones(3)
    )


def test_selection_refuses():
    for alpha in (-0.1, 1.1, np.nan):
        with pytest.raises(ArgumentError, match="alpha from 0"):
            infinite_feature_selection(table(), alpha)
        with pytest.raises(ArgumentError, match="alpha from 0"):
            NISP(DATA, alpha=alpha)
    for factor in (0, 1):
        with pytest.raises(ArgumentError, match="factor between"):
            infinite_feature_selection(table(), factor=factor)
    with pytest.raises(DataError, match="two examples or more"):
        infinite_feature_selection(np.ones((1, 4)))
    with pytest.raises(DataError, match="finite features"):
        infinite_feature_selection(np.full((4, 4), np.nan))


# -- one call ------------------------------------------------------------------------------------


def through(layer, shape, points=None, score=None):
    """What a layer hands down for one example of ``shape``: the score of the input."""
    inputs = keras.Input(shape)
    model = randomize(keras.Model(inputs, layer(inputs)))
    (call,) = trace(model).calls
    points = [[np.zeros((1, *shape), "float32")]] if points is None else points
    out = np.shape(call.op(points[0][0]))
    score = np.random.default_rng(0).uniform(0, 1, out) if score is None else score
    return kind_of(call), way_back(call, points)([score])[0], score, call.op


def absolute_jacobian(function, shape, score):
    """|J|^T s of a linear function, J found one unit input at a time."""
    size = int(np.prod(shape))
    units = np.eye(size, dtype="float32").reshape(size, 1, *shape)
    offset = np.asarray(function(np.zeros((1, *shape), "float32")), np.float64)
    columns = [np.asarray(function(unit), np.float64) - offset for unit in units]
    return np.array([np.sum(np.abs(c) * score) for c in columns]).reshape(1, *shape)


KERNELS = {
    "dense": (layers.Dense(5, name="k0"), (4,)),
    "dense on maps": (layers.Dense(5, name="k1"), (2, 3, 4)),
    "convolution": (layers.Conv2D(3, 3, strides=2, padding="same", name="k2"), (5, 6, 2)),
    "dilated": (layers.Conv2D(3, 2, dilation_rate=2, name="k3"), (5, 5, 2)),
    "one dimension": (layers.Conv1D(3, 3, padding="causal", name="k4"), (6, 2)),
    "three dimensions": (layers.Conv3D(3, 2, name="k9"), (3, 3, 4, 2)),
    "grouped": (layers.Conv2D(4, 3, groups=2, name="k5"), (4, 4, 6)),
    "transposed": (layers.Conv2DTranspose(3, 2, strides=2, name="k6"), (3, 3, 2)),
    "depthwise": (layers.DepthwiseConv2D(3, depth_multiplier=2, name="k7"), (5, 5, 2)),
    "einsum": (layers.EinsumDense("abc,cd->abd", (4, 5), bias_axes="d", name="k8"), (4, 3)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_layers_with_kernels(name):
    """Sheet B2, step B: |W|^T s, with the same strides, padding and dilation."""
    layer, shape = KERNELS[name]
    kind, found, score, op = through(layer, shape)
    assert kind == "kernel"
    # float32, no cancellation.
    np.testing.assert_allclose(found, absolute_jacobian(op, shape, score), rtol=1e-5)
    assert found.shape == (1, *shape)


def test_separable_convolution_is_two_layers():
    kind, found, score, op = through(layers.SeparableConv2D(3, 3, use_bias=True), (5, 5, 2))
    assert kind == "kernel"
    x = tf.zeros((1, 5, 5, 2))
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = tf.nn.separable_conv2d(
            x, tf.abs(op.depthwise_kernel), tf.abs(op.pointwise_kernel), [1, 1, 1, 1], "VALID"
        )
    expected = tape.gradient(y, x, output_gradients=tf.constant(score, tf.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32


def test_activation_of_a_layer_and_bias_play_no_part():
    for activation in (None, "relu", "sigmoid"):
        keras.utils.set_random_seed(0)
        _, found, score, op = through(layers.Dense(5, activation=activation), (4,))
        expected = score @ np.abs(np.asarray(op.kernel)).T
        np.testing.assert_allclose(found, expected, rtol=1e-6)  # float32


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"axis": 1}])
def test_batch_normalisation(options):
    kind, found, score, op = through(layers.BatchNormalization(**options), (4, 4, 4))
    assert kind == "scale"
    scale = 1 / np.sqrt(np.asarray(op.moving_variance, np.float64) + op.epsilon)
    if op.gamma is not None:
        scale = scale * np.abs(np.asarray(op.gamma, np.float64))
    scale = scale[:, None, None] if op.axis == 1 else scale
    np.testing.assert_allclose(found, score * scale, rtol=1e-12)  # float64


@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_max_pooling_sums_over_windows(dimensions, padding):
    pooling = (layers.MaxPooling1D, layers.MaxPooling2D, layers.MaxPooling3D)[dimensions - 1]
    average = (layers.AveragePooling1D, layers.AveragePooling2D, layers.AveragePooling3D)
    shape = (5,) * dimensions + (2,)
    kind, found, score, _ = through(pooling(3, strides=2, padding=padding), shape)
    assert kind == "maximum"
    assert kind_of(trace(keras.Sequential([keras.Input(shape), pooling(2)])).calls[0]) == "maximum"
    # Each input of a window gets the window's score: the windows, by where an average looks.
    sees = average[dimensions - 1](3, strides=2, padding=padding)
    expected = np.zeros((1, *shape))
    for index in np.ndindex(*shape[:-1]):
        unit = np.zeros((1, *shape), "float32")
        unit[(0, *index)] = 1
        expected[(0, *index)] = (score * (np.asarray(sees(unit)) > 0)).sum(
            (*range(dimensions + 1),)
        )
    np.testing.assert_allclose(found, expected, rtol=1e-5)  # float32


def test_global_max_pooling():
    kind, found, score, _ = through(layers.GlobalMaxPooling2D(), (3, 4, 2))
    assert kind == "maximum"
    np.testing.assert_allclose(found, np.broadcast_to(score[:, None, None], (1, 3, 4, 2)), 1e-6)


LINEAR = {
    "average": (layers.AveragePooling2D(2, name="l0"), (4, 4, 2)),
    "average, same": (layers.AveragePooling2D(3, padding="same", name="l1"), (4, 4, 2)),
    "global average": (layers.GlobalAveragePooling2D(name="l2"), (3, 4, 2)),
    "flatten": (layers.Flatten(name="l3"), (3, 4, 2)),
    "reshape": (layers.Reshape((6, 4), name="l4"), (3, 4, 2)),
    "permute": (layers.Permute((2, 1), name="l5"), (3, 4)),
    "padding": (layers.ZeroPadding2D(2, name="l6"), (3, 4, 2)),
    "cropping": (layers.Cropping2D(1, name="l7"), (4, 4, 2)),
    "enlarging": (layers.UpSampling2D(2, name="l8"), (3, 3, 2)),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_layers(name):
    layer, shape = LINEAR[name]
    kind, found, score, op = through(layer, shape)
    assert kind == "linear"
    np.testing.assert_allclose(found, absolute_jacobian(op, shape, score), rtol=1e-5)  # float32


@pytest.mark.parametrize(
    "layer",
    [layers.ReLU(name="a0"), layers.Dropout(0.5, name="a1"), layers.Activation("gelu", name="a2")],
    ids=lambda layer: layer.name,
)
def test_activations_pass(layer):
    kind, found, score, _ = through(layer, (3, 2))
    assert kind == "pass"
    np.testing.assert_array_equal(found, score)


def test_other_layers_by_their_jacobian_on_data():
    random = np.random.default_rng(0)
    points = [[random.standard_normal((1, 4)).astype("float32")] for _ in range(3)]
    kind, found, score, op = through(layers.Softmax(), (4,), points)
    assert kind == "data"
    assert through(layers.Activation("softmax"), (4,), points)[0] == "data"
    expected = []
    for (x,) in points:
        p = np.asarray(op(x), np.float64)[0]
        expected.append(np.abs((np.diag(p) - np.outer(p, p)) @ score[0]))
    np.testing.assert_allclose(found[0], np.mean(expected, 0), rtol=1e-4)  # float32, cancelling
    kind, found, score, _ = through(layers.Rescaling(-3.0, 1.0), (4,), points)
    assert kind == "data"
    np.testing.assert_allclose(found, 3 * score, rtol=1e-6)  # float32


# -- whole models --------------------------------------------------------------------------------


def counting(features):
    """A ranking that tells features apart: 1, 2, 3, ..."""
    return np.arange(1.0, features.shape[1] + 1)


def scores_of(model, data=DATA, **options):
    """Scores on one scale: that on which the first classifier's features count 1, 2, 3, ..."""
    options = {"ranking": counting, "normalize": "none", **options}
    return NISP(data, **options)(tfprune.analyse(model))


def proportional(found, expected, rtol=1e-5):
    """All groups agree up to one common factor."""
    names = list(expected)
    a = np.concatenate([found[name] for name in names])
    b = np.concatenate([expected[name] for name in names])
    # float32 products of absolute values, which do not cancel.
    np.testing.assert_allclose(a / a.sum(), b / b.sum(), rtol=rtol)


def absolute(model, name):
    return np.abs(np.asarray(model.get_layer(name).kernel, np.float64))


def test_two_linear_layers():
    """Sheet B2, own test (i)."""
    inputs = keras.Input((7,))
    x = layers.Dense(6, name="first")(inputs)
    x = layers.Dense(5, name="second")(x)
    model = randomize(keras.Model(inputs, layers.Dense(3, name="head")(x)))
    data = np.random.default_rng(0).standard_normal((20, 7)).astype("float32")
    final = np.arange(1.0, 6.0)
    expected = {"first": absolute(model, "second") @ final, "second": final}
    proportional(scores_of(model, data), expected)
    # Within a layer, divided by the mean.
    within = scores_of(model, data, normalize="mean")["first"]
    np.testing.assert_allclose(within, expected["first"] / expected["first"].mean(), rtol=1e-5)


def forked():
    """A residual stream, branches, pooling, a depthwise convolution and a flatten."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", name="stem")(inputs)
    x = layers.ReLU(name="relu0")(layers.BatchNormalization(name="norm0")(x))
    y = layers.Conv2D(5, 3, padding="same", name="inner")(x)
    y = layers.ReLU(name="relu1")(layers.BatchNormalization(name="norm1")(y))
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(y)
    y = layers.Conv2D(6, 1, name="outer")(y)
    x = layers.ReLU(name="relu2")(layers.Add(name="sum")([x, y]))
    p = layers.MaxPooling2D(3, 2, padding="same", name="pool")(x)
    q = layers.Conv2D(4, 3, strides=2, padding="same", name="branch")(x)
    x = layers.Concatenate(name="both")([p, q])
    x = layers.Flatten(name="flat")(layers.Conv2D(4, 1, name="last")(x))
    return randomize(keras.Model(inputs, layers.Dense(3, name="head")(x)))


def twin(model, removed=None):
    """Sheet B2, own test (ii): gradients of <s, absolute twin> by offsets where channels are read.

    Written by hand for :func:`forked`, in float64.
    """
    removed = removed or {}
    widths = {"stem": 6, "inner": 5, "branch": 4, "last": 4}
    offsets = {name: tf.zeros(width, tf.float64) for name, width in widths.items()}
    masks = {
        name: tf.constant(~np.isin(np.arange(width), removed.get(name, [])), tf.float64)
        for name, width in widths.items()
    }

    def read(x, name):
        return (x + offsets[name]) * masks[name]

    def conv(x, name, strides=1):
        return tf.nn.conv2d(x, tf.constant(absolute(model, name)), strides, "SAME")

    def norm(x, name):
        layer = model.get_layer(name)
        scale = np.abs(layer.gamma) / np.sqrt(np.asarray(layer.moving_variance) + layer.epsilon)
        return x * tf.constant(scale, tf.float64)

    with tf.GradientTape() as tape:
        tape.watch(offsets)
        x = norm(tf.ones((1, 8, 8, 6), tf.float64), "norm0")
        y = norm(conv(read(x, "stem"), "inner"), "norm1")
        y = tf.nn.depthwise_conv2d(
            y, tf.constant(absolute(model, "depthwise")), [1, 1, 1, 1], "SAME"
        )
        x = x + conv(read(y, "inner"), "outer")
        ones = tf.constant(np.ones((3, 3, 6, 1)))
        pooled = tf.nn.depthwise_conv2d(x, ones, [1, 2, 2, 1], "SAME")
        branch = conv(read(x, "stem"), "branch", 2)
        joined = tf.concat([read(pooled, "stem"), read(branch, "branch")], 3)
        final = tf.reshape(read(conv(joined, "last"), "last"), (1, -1))
        response = tf.reduce_sum(final * tf.constant(np.arange(1.0, 65.0)))
    return {name: np.asarray(g) for name, g in tape.gradient(response, offsets).items()}


def test_sweep_is_the_gradient_of_an_absolute_twin():
    """Sheet B2, own tests (ii) and (iii): the stream is read three times, all of them count."""
    model = forked()
    graph = tfprune.analyse(model)
    assert {g.name for g in graph.prunable} == {"stem", "inner", "branch", "last"}
    proportional(scores_of(model), twin(model))


def test_what_went_is_not_handed_down():
    """Sheet B2, step B.2, and own test (iv): a group that keeps everything changes nothing."""
    model = forked()
    graph = tfprune.analyse(model)
    criterion = NISP(DATA, ranking=counting)
    quotas = {name: Quota(3, NONE) for name in ("stem", "inner", "branch", "last")}
    kept, removed = {}, {}
    # From the output to the input; the stem is complete when its first reader was reached.
    for name in ("last", "branch", "inner", "stem"):
        scores = twin(model, removed)[name]
        kept[name] = np.sort(np.argsort(-scores)[:3])
        removed[name] = np.setdiff1d(np.arange(len(scores)), kept[name])
    found = criterion.select(graph, quotas).kept
    assert found.keys() == kept.keys()
    for name, indices in kept.items():
        np.testing.assert_array_equal(found[name], indices)

    scores = criterion(graph)
    for name in ("inner", "stem"):
        alone = criterion.select(graph, {name: Quota(2, NONE)}).kept[name]
        np.testing.assert_array_equal(alone, np.sort(np.argsort(-scores[name])[:2]))
        others = {other: Quota(graph[other].width, NONE) for other in quotas if other != name}
        with_whole = criterion.select(graph, {name: Quota(2, NONE), **others}).kept
        np.testing.assert_array_equal(with_whole[name], alone)


def test_removed_channels_change_later_choices():
    """Two features are made by different halves of the units below; without one its half goes."""
    inputs = keras.Input((4,))
    below = layers.Dense(6, name="below")(inputs)
    model = keras.Model(
        inputs, layers.Dense(2, name="head")(layers.Dense(2, name="features")(below))
    )
    kernel = np.zeros((6, 2), "float32")
    kernel[:3, 0], kernel[3:, 1] = [10, 8, 7], [1, 2, 3]
    model.get_layer("features").kernel.assign(kernel)
    data = np.random.default_rng(0).standard_normal((20, 4)).astype("float32")
    criterion = NISP(data, ranking=counting)
    graph = tfprune.analyse(model)
    quota = Quota(3, NONE)
    whole = criterion.select(graph, {"below": quota}).kept["below"]
    np.testing.assert_array_equal(whole, [0, 1, 2])
    both = criterion.select(graph, {"below": quota, "features": Quota(1, NONE)}).kept
    np.testing.assert_array_equal(both["features"], [1])
    np.testing.assert_array_equal(both["below"], [3, 4, 5])
    protected = criterion.select(graph, {"below": Quota(3, np.array([0, 1]))}).kept["below"]
    np.testing.assert_array_equal(protected, [0, 1, 2])


def test_gates_receive_the_mean_of_the_other_factor():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 1, name="maps")(inputs)
    z = layers.Dense(5, activation="relu", name="squeeze")(
        layers.GlobalAveragePooling2D(keepdims=True, name="pool")(x)
    )
    gate = layers.Dense(4, activation="sigmoid", name="excite")(z)
    y = layers.Conv2D(6, 1, name="after")(layers.Multiply(name="gated")([x, gate]))
    y = layers.GlobalAveragePooling2D(name="last")(y)
    model = randomize(keras.Model(inputs, layers.Dense(2, name="head")(y)))
    found = scores_of(model)
    final = np.arange(1.0, 7.0)
    gated = (absolute(model, "after") @ final)[0, 0] / 64  # at each of 8 x 8 positions
    maps = keras.Model(inputs, x)(DATA)
    magnitude = np.abs(np.asarray(maps, np.float64)).mean(0).sum((0, 1))
    units = absolute(model, "excite") @ (gated * magnitude)
    # The maps are read by what follows the gate, and by the gate's own first layer.
    expected = {
        "squeeze": units,
        "after": final,
        "maps": gated * 64 + absolute(model, "squeeze") @ units,
    }
    proportional(found, expected, rtol=1e-4)  # sums of float32 magnitudes


def test_nested_models_are_walked_in_place():
    flat = toys.chain()
    inner = keras.Sequential([keras.Input((8, 8, 3))], name="inner")
    for layer in flat.layers[1:7]:
        inner.add(layer)
    inputs = keras.Input((8, 8, 3))
    x = inner(inputs)
    for layer in flat.layers[7:-1]:
        x = layer(x)
    top = keras.Sequential([keras.Input((16,)), flat.layers[-1]], name="top")
    nested = keras.Model(inputs, top(x))
    (call,) = classifiers(tfprune.analyse(nested))
    assert call.op.name == "head"
    expected = scores_of(flat)
    found = scores_of(nested)
    for name in expected:
        other = name if name == "conv2" else f"inner/{name}"
        np.testing.assert_allclose(found[other], expected[name], rtol=1e-6)  # the same float32


def test_several_outputs_add_up():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, activation="relu", name="conv")(inputs)
    a = layers.GlobalAveragePooling2D(name="a")(x)
    b = layers.Flatten(name="flat")(layers.MaxPooling2D(6, name="b")(x))
    heads = [layers.Dense(2, name="head_a")(a), layers.Dense(3, name="head_b")(b)]
    model = randomize(keras.Model(inputs, heads))
    assert {call.op.name for call in classifiers(tfprune.analyse(model))} == {"head_a", "head_b"}
    proportional(scores_of(model), {"conv": 2 * np.arange(1.0, 7.0)})
    # One tensor with two readers is ranked once.
    heads = [layers.Dense(2, name="first")(a), layers.Dense(3, name="second")(a)]
    both = keras.Model(inputs, heads)
    np.testing.assert_allclose(
        scores_of(both)["conv"] / np.arange(1.0, 7.0), scores_of(both)["conv"][0], rtol=1e-6
    )


def test_a_classifier_on_maps():
    """A 1 x 1 convolution before the average is the same classifier as a dense one after it."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, activation="relu", name="below")(inputs)
    x = layers.Conv2D(5, 3, activation="relu", name="conv")(x)
    convolution = layers.GlobalAveragePooling2D(name="after")(layers.Conv2D(2, 1, name="c")(x))
    dense = layers.Dense(2, name="d")(layers.GlobalAveragePooling2D(name="before")(x))
    found = [
        scores_of(randomize(keras.Model(inputs, y)), ranking=None) for y in (convolution, dense)
    ]
    proportional(found[0], found[1])


def test_ranking_is_infinite_feature_selection():
    model = toys.chain()
    features = np.asarray(keras.Model(model.inputs[0], model.get_layer("pool").output)(DATA))
    found = scores_of(model, ranking=None, alpha=0.3)["conv2"]
    expected = infinite_feature_selection(features, 0.3)
    proportional({"conv2": found}, {"conv2": expected}, rtol=1e-4)  # float32 features
    halves = scores_of(model, ranking=None, alpha=0.3, batch_size=5)["conv2"]
    np.testing.assert_allclose(halves, found, rtol=1e-4)


def test_tf_keras():
    inputs = tf_keras.Input((8, 8, 3))
    x = tf_keras.layers.Conv2D(6, 3, padding="same", use_bias=False, name="stem")(inputs)
    x = tf_keras.layers.BatchNormalization(name="norm")(x)
    x = tf_keras.layers.MaxPooling2D(2, name="pool")(tf.nn.relu(x))
    y = tf_keras.layers.Conv2D(6, 1, activation="relu", name="inner")(x)
    x = tf_keras.layers.GlobalAveragePooling2D(name="mean")(x + y)
    model = tf_keras.Model(inputs, tf_keras.layers.Dense(3, name="head")(x))
    found = scores_of(model)
    final = np.arange(1.0, 7.0)
    below = np.abs(np.asarray(model.get_layer("inner").kernel, np.float64))[0, 0] @ final
    # "stem" is the stream: read by the inner convolution and by the head.
    proportional(found, {"stem": final + below})
    plan = tfprune.plan(model, macs=0.5, criterion=NISP(DATA), round_to=1)
    assert tfprune.verify(model, plan)


def test_attention_and_recurrent_layers():
    inputs = keras.Input((6, 8))
    x = layers.Dense(10, activation="relu", name="embed")(inputs)
    x = layers.Add(name="sum")([x, layers.MultiHeadAttention(3, 4, name="attention")(x, x)])
    x = layers.LSTM(7, name="recurrent")(layers.LayerNormalization(name="norm")(x))
    model = randomize(keras.Model(inputs, layers.Dense(2, name="head")(x)))
    data = np.random.default_rng(0).standard_normal((3, 6, 8)).astype("float32")
    criterion = NISP(data)
    check_criterion(criterion, model)
    graph = tfprune.analyse(model)
    scores, norms = criterion(graph), L1()(graph)
    heads = [name for name in scores if name.startswith("attention:") and name in norms]
    assert len(heads) >= 3
    for name in heads:
        np.testing.assert_array_equal(scores[name], norms[name])
    for name in ("embed", "recurrent"):
        assert (scores[name] > 0).all() and not np.allclose(scores[name], norms[name])
    plan = tfprune.plan(model, macs=0.6, criterion=criterion, round_to=1)
    assert tfprune.verify(model, plan)


@pytest.mark.parametrize("gain", [1e6, 1e-7])
def test_deep_networks_stay_finite(gain):
    """80 layers whose products of weights leave every floating-point range."""
    inputs = x = keras.Input((4,))
    for number in range(80):
        x = layers.Dense(3, use_bias=False, name=f"layer{number}")(x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    random = np.random.default_rng(0)
    for layer in model.layers[1:]:
        layer.kernel.assign(gain * random.uniform(0.5, 1, layer.kernel.shape))
    data = random.standard_normal((20, 4)).astype("float32")
    scores = scores_of(model, data, normalize="mean")
    expected = np.arange(1.0, 4.0)
    for number in reversed(range(80)):
        name = f"layer{number}"
        # float32 products, one layer after the other.
        np.testing.assert_allclose(scores[name], expected / expected.mean(), rtol=1e-3)
        kernel = np.asarray(model.get_layer(name).kernel, np.float64)
        if number:
            expected = kernel @ expected
            expected /= expected.max()


def test_common_exponents():
    a, b = Scaled.of(np.array([3.0, 0.0]), 5000), Scaled.of(np.array([1.0, 4.0]), 5002)
    total = a + b
    np.testing.assert_array_equal(total.at(5000), [7.0, 16.0])
    nothing = Scaled.of(np.zeros(2))
    np.testing.assert_array_equal((nothing + a).at(5000), [3.0, 0.0])
    small = Scaled.of(np.array([1.0, 2.0]), -90000)
    np.testing.assert_array_equal((small + nothing).at(-90000), [1.0, 2.0])


@pytest.mark.parametrize("build", [toys.chain, toys.residual])
def test_contract(build):
    check_criterion(NISP(DATA), build())


@pytest.mark.parametrize("build", [toys.chain, toys.residual, forked])
def test_plans(build):
    model = build()
    plan = tfprune.plan(model, macs=0.5, criterion=NISP(DATA), round_to=1)
    assert tfprune.verify(model, plan)
    assert "NISP, 1 batches" in plan.notes["criterion"]


def test_bad_input(monkeypatch):
    graph = tfprune.analyse(toys.chain())
    with pytest.raises(DataError, match="empty"):
        NISP(DATA[:0])(graph)
    with pytest.raises(DataError, match="two examples"):
        NISP(DATA[:1])(graph)
    with pytest.raises(DataError, match="finite"):
        NISP(np.full_like(DATA, np.nan))(graph)
    with pytest.raises(ArgumentError, match=r"at most 10 features.*Received: 16 at the input of"):
        NISP(DATA, most_features=10)(graph)
    with pytest.raises(ArgumentError, match="a ranking that gives 16"):
        NISP(DATA, ranking=lambda features: np.ones(3))(graph)
    with pytest.raises(ArgumentError, match="a ranking that gives 16"):
        NISP(DATA, ranking=lambda features: -np.ones(16))(graph)
    inputs = keras.Input((4,))
    headless = tfprune.analyse(keras.Model(inputs, layers.ReLU()(inputs)))
    with pytest.raises(ModelError, match="operation with weights"):
        NISP(np.ones((3, 4)))(headless)
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(ArgumentError, match="Expected a model on TensorFlow"):
        NISP(DATA)(graph)


def test_the_model_is_only_read():
    model = forked()
    before = [np.array(w) for w in model.get_weights()]
    graph = tfprune.analyse(model)
    state = np.random.get_state()[1].copy()
    NISP(DATA).select(graph, {"inner": Quota(2, NONE)})
    np.testing.assert_array_equal(np.random.get_state()[1], state)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
