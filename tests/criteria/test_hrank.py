"""HRank: maps of known rank, and numpy.linalg.matrix_rank; also where maps are observed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfprune
from tests import toys
from tfprune.cost import measure
from tfprune.criteria import L1, HRank
from tfprune.testing import check_criterion, randomize

layers = keras.layers
DATA = toys.images()


def identity(width):
    """Options of a layer that hands its input on, exactly."""
    eye = keras.initializers.Constant(np.eye(width, dtype="float32"))
    return {"use_bias": False, "kernel_initializer": eye}


def passing(width, name):
    """A 1 x 1 convolution whose outputs are its inputs."""
    return layers.Conv2D(width, 1, name=name, **identity(width))


def finish(inputs, x):
    return randomize(keras.Model(inputs, layers.Dense(2, name="out")(x)))


def known_ranks(count=3, size=6):
    """Images whose three channels have rank 1, rank ``size`` - (0, 1, 2, ...), and rank 0."""
    images = np.zeros((count, size, size, 3), "float32")
    images[..., 0] = np.outer(np.arange(1, size + 1), np.ones(size))
    for number in range(count):
        images[number, :, :, 1] = np.diag(np.arange(size) >= number)
    return images


def raw(model, data, **options):
    return HRank(data, normalize="none", **options)(tfprune.analyse(model))


def activation(model, name, x):
    return np.asarray(keras.Model(model.inputs[0], model.get_layer(name).output)(x))


@pytest.mark.parametrize("build", [toys.chain, toys.residual])
def test_contract(build):
    check_criterion(HRank(DATA), build())


def test_known_ranks():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3, name="next")(passing(3, name="conv")(inputs))
    model = finish(inputs, layers.GlobalAveragePooling2D()(x))
    data = known_ranks()
    # Ranks are whole numbers, and their means over three images are rounded once.
    np.testing.assert_array_equal(raw(model, data)["conv"], [1, (6 + 5 + 4) / 3, 0])
    mean = (1 + 5 + 0) / 3
    scores = HRank(data)(tfprune.analyse(model))["conv"]
    np.testing.assert_allclose(scores, [1 / mean, 5 / mean, 0], rtol=1e-15)


def test_against_numpy():
    """A map read by a convolution, and one that ends in a global pooling."""
    model = toys.chain()
    for name, width in (("norm1", 12), ("norm2", 16)):
        model.get_layer(name).beta.assign(np.linspace(-1.5, 0.5, width))  # few positive values
    scores = raw(model, DATA)
    for group, relu in (("conv1", "relu1"), ("conv2", "relu2")):
        maps = activation(model, relu, DATA)
        expected = [
            np.mean([np.linalg.matrix_rank(maps[n, :, :, k]) for n in range(len(maps))])
            for k in range(maps.shape[-1])
        ]
        # Means of the same whole numbers.
        np.testing.assert_allclose(scores[group], expected, rtol=1e-15)
        assert len(np.unique(expected)) > 4  # else the comparison would say little


def test_rank_of_single_precision():
    """Rounding in float32 is not rank, though it would be with the tolerance of float64."""
    random = np.random.default_rng(0)
    data = np.zeros((4, 8, 8, 2), "float32")
    data[..., 0] = random.normal(size=(4, 8, 2)) @ random.normal(size=(4, 2, 8))
    data[..., 1] = random.normal(size=(4, 8, 8))
    assert (np.linalg.matrix_rank(data[..., 0].astype(np.float64)) > 2).all()
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3)(passing(2, name="conv")(inputs))
    model = finish(inputs, layers.GlobalAveragePooling2D()(x))
    np.testing.assert_array_equal(raw(model, data)["conv"], [2, 8])


def test_residual_stream_is_observed_where_it_is_read():
    model = toys.residual()
    model.get_layer("stem_norm").beta.assign(np.linspace(-3, 0.5, 16))
    names = [layer.name for layer in model.layers]
    behind_stem = names[names.index("stem_norm") + 1]
    places = [
        np.linalg.matrix_rank(np.moveaxis(activation(model, name, DATA), 3, 1)).mean(0)
        for name in (behind_stem, "sum")  # read by "expand"; flattened in front of "head"
    ]
    graph = tfprune.analyse(model)
    # Means of the same whole numbers.
    np.testing.assert_allclose(raw(model, DATA)["stem"], sum(places) / 2, rtol=1e-15)
    np.testing.assert_allclose(
        HRank(DATA)(graph)["stem"], sum(p / p.mean() for p in places) / 2, rtol=1e-14
    )
    assert np.ptp(places[0]) > 1 and not np.array_equal(*places)


def test_pooling_is_seen_as_its_reader_sees_it():
    inputs = keras.Input((6, 6, 3))
    x = layers.AveragePooling2D(2)(passing(3, name="conv")(inputs))
    model = finish(inputs, layers.GlobalAveragePooling2D()(layers.Conv2D(4, 1)(x)))
    # Of the images, the diagonal of ones gives 3, with one corner 0 still 3, with two 2.
    np.testing.assert_array_equal(raw(model, known_ranks())["conv"], [1, (3 + 3 + 2) / 3, 0])


@pytest.mark.parametrize(
    "fold",
    [
        layers.Flatten(), layers.GlobalMaxPooling2D(), layers.GlobalAveragePooling2D(keepdims=True),
        layers.AveragePooling2D(6), layers.Reshape((108,)),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_the_last_map_in_front_of_dense_layers(fold):
    inputs = keras.Input((6, 6, 3))
    x = layers.Flatten(name="last")(fold(passing(3, name="conv")(inputs)))
    scores = raw(finish(inputs, x), known_ranks())
    np.testing.assert_array_equal(scores["conv"], [1, 5, 0])


def test_concatenation_and_several_positions():
    inputs = keras.Input((6, 6, 3))
    a, b = passing(3, name="a")(inputs), passing(3, name="b")(inputs)
    b = layers.Concatenate()([b, layers.AveragePooling2D(6, 1, "same")(b)])  # twice the channels
    x = layers.Conv2D(4, 3)(layers.Concatenate()([a, b]))
    model = finish(inputs, layers.GlobalAveragePooling2D()(x))
    scores = raw(model, known_ranks())
    np.testing.assert_array_equal(scores["a"], [1, 5, 0])
    blurred = np.moveaxis(np.asarray(layers.AveragePooling2D(6, 1, "same")(known_ranks())), 3, 1)
    both = (np.array([1, 5, 0]) + np.linalg.matrix_rank(blurred).mean(0)) / 2
    # A mean over places on the axis, of means over images.
    np.testing.assert_allclose(scores["b"], both, rtol=1e-15)


def test_one_tensor_with_many_readers_is_one_place():
    inputs = keras.Input((6, 6, 3))
    x = passing(3, name="conv")(inputs)
    pooled = layers.AveragePooling2D(2)(x)
    ends = [layers.Conv2D(4, 1)(x) for _ in range(3)] + [layers.Conv2D(4, 1)(pooled)]
    ends = [layers.GlobalAveragePooling2D()(end) for end in ends]
    model = finish(inputs, layers.Concatenate()(ends))
    expected = (5 + (3 + 3 + 2) / 3) / 2  # not three parts of 5
    # A mean of two means.
    np.testing.assert_allclose(raw(model, known_ranks())["conv"], [1, expected, 0], rtol=1e-15)


def test_units_without_a_map():
    """A number is a map of 1 x 1: the score is how often it is not zero."""
    inputs = keras.Input((5,))
    x = layers.ReLU(name="relu")(layers.Dense(7, name="hidden")(inputs))
    model = finish(inputs, x)
    data = np.random.default_rng(0).standard_normal((20, 5)).astype("float32")
    share = (activation(model, "relu", data) > 0).mean(0)
    # Whole numbers over 20, both ways.
    np.testing.assert_allclose(raw(model, data)["hidden"], share, rtol=1e-15)
    assert len(np.unique(share)) > 2


def test_sequences_and_volumes():
    inputs = keras.Input((6, 2))
    x = layers.Conv1D(2, 1, name="conv", **identity(2))(inputs)
    model = finish(inputs, layers.GlobalAveragePooling1D()(layers.Conv1D(3, 2)(x)))
    data = np.ones((4, 6, 2), "float32")
    data[:3, :, 1] = 0
    np.testing.assert_array_equal(raw(model, data)["conv"], [1, 1 / 4])

    inputs = keras.Input((3, 6, 6, 3))
    x = layers.Conv3D(3, 1, name="conv", **identity(3))(inputs)
    model = finish(inputs, layers.GlobalAveragePooling3D()(layers.Conv3D(3, 2)(x)))
    # The slices of one volume are the three images.
    np.testing.assert_array_equal(raw(model, known_ranks()[None])["conv"], [1, 5, 0])


def test_nested_and_wrapped_readers():
    inner = keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(4, 3)], name="inner")
    inputs = keras.Input((6, 6, 3))
    x = layers.GlobalAveragePooling2D()(inner(passing(3, name="conv")(inputs)))
    np.testing.assert_array_equal(raw(finish(inputs, x), known_ranks())["conv"], [1, 5, 0])

    inputs = keras.Input((4, 3))
    x = layers.Dense(3, name="units", **identity(3))(inputs)
    x = layers.TimeDistributed(layers.Dense(2))(x)
    data = np.ones((5, 4, 3), "float32")
    data[:2, :, 1] = 0
    model = finish(inputs, layers.GlobalAveragePooling1D()(x))
    np.testing.assert_array_equal(raw(model, data)["units"], [1, 3 / 5, 1])


def test_channels_inside_a_layer_are_scored_by_their_filters():
    inputs = keras.Input((6, 8))
    x = layers.MultiHeadAttention(4, 8, name="attention")(inputs, inputs)
    x = layers.GlobalAveragePooling1D()(layers.Conv1D(5, 2, name="conv")(x))
    model = finish(inputs, x)
    graph = tfprune.analyse(model)
    data = np.random.default_rng(0).standard_normal((4, 6, 8)).astype("float32")
    scores, norms = HRank(data)(graph), L1()(graph)
    heads = [group.name for group in graph.prunable if "heads" in group.name]
    assert heads
    for name in heads:
        np.testing.assert_array_equal(scores[name], norms[name])
    assert not np.array_equal(scores["conv"], norms["conv"])


def test_limits_and_kinds_of_data():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(4, 3)(passing(3, name="conv")(inputs))
    model = finish(inputs, layers.GlobalAveragePooling2D()(x))
    data = np.concatenate([known_ranks(6)] * 4)  # more than the model sees at once
    first = raw(model, data[:10])["conv"]
    for limited in (
        raw(model, data, batches=2, batch_size=5),
        raw(model, (data, np.zeros(len(data))), batches=1, batch_size=10),
        raw(model, tf.data.Dataset.from_tensor_slices(data).batch(5).repeat(), batches=2),
    ):
        np.testing.assert_array_equal(limited["conv"], first)
    whole = raw(model, data, batches=None, batch_size=7)["conv"]
    np.testing.assert_allclose(whole, [1, (6 + 5 + 4 + 3 + 2 + 1) / 6, 0], rtol=1e-15)  # one mean
    assert "HRank, 2 batches" in HRank(data, batch_size=12)(tfprune.analyse(model)).criterion
    assert (HRank(data).batches, HRank(data).batch_size) == (5, 128)


def test_data_that_cannot_be_used():
    graph = tfprune.analyse(toys.chain())
    with pytest.raises(tfprune.TfpruneError, match="empty"):
        HRank(DATA[:0])(graph)
    with pytest.raises(tfprune.TfpruneError, match="Expected batches of shape"):
        HRank(DATA[:, :4])(graph)
    with pytest.raises(tfprune.TfpruneError, match="positive limit"):
        HRank(DATA, batches=0)(graph)
    with pytest.raises(tfprune.TfpruneError, match="NaN or infinity at the input of 'conv1'"):
        HRank(np.full_like(DATA, np.nan))(graph)
    with pytest.raises(tfprune.TfpruneError, match="Expected data for criterion 'hrank'"):
        tfprune.criteria.get("hrank")
    with pytest.raises(tfprune.TfpruneError, match="Expected normalize"):
        HRank(DATA, normalize="z")(graph)


def test_the_model_is_only_read():
    model = toys.residual()
    before = [np.array(w) for w in model.get_weights()]
    HRank(DATA)(tfprune.analyse(model))
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_published_configuration_of_resnet_56():
    """Sheet A9.4, "Check": the authors count each layer's own removed filters, and no inputs.

    62,715,530 MACs and 489,359 parameters, the paper's 62.72M and 0.49M; what slicing the readers
    leaves is less.
    """
    rates = [0.1] + [0.6] * 35 + [0] * 2 + [0.6] * 6 + [0.4] * 3 + [0.1, 0.4] * 4
    widths = [16] * 19 + [32] * 18 + [64] * 18
    cost = measure(tfprune.zoo.resnet_cifar(56))
    layers = [layer for layer in cost.layers if layer.kind == "Conv2D"]
    kept = [width - int(width * rate) for width, rate in zip(widths, rates, strict=True)]
    macs, parameters = (
        sum(getattr(layer, what) * k // w for layer, k, w in zip(layers, kept, widths, strict=True))
        for what in ("macs", "parameters")
    )
    head = 64 * 10 + 10  # the classifier, whose bias the authors count among the MACs
    assert macs + head == 62_715_530
    assert parameters + head == 489_359
