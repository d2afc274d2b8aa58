"""CHIP: the fall of the nuclear norm against explicit norms, channel by channel."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfprune
from tests import toys
from tfprune.criteria import CHIP
from tfprune.criteria.chip import independence
from tfprune.testing import check_criterion, randomize

layers = keras.layers
DATA = toys.images()


def nuclear(matrix):
    return np.linalg.svd(matrix, compute_uv=False).sum()


def explicit(matrix):
    """The definition: the nuclear norm with all rows, less the one with a row zeroed."""
    matrix = np.asarray(matrix, np.float64)
    falls = []
    for row in range(len(matrix)):
        without = matrix.copy()
        without[row] = 0
        falls.append(nuclear(matrix) - nuclear(without))
    return np.array(falls)


def matrices():
    random = np.random.default_rng(0)
    low = random.normal(size=(16, 3)) @ random.normal(size=(3, 64))
    return {
        "wide": random.normal(size=(12, 64)),
        "square": random.normal(size=(9, 9)),
        "tall": random.normal(size=(20, 6)),
        "one column": random.normal(size=(8, 1)),
        "rectified": np.maximum(random.normal(size=(16, 64)), 0),
        "in pairs": np.repeat(random.normal(size=(6, 40)), 2, axis=0),
        "low rank": low,
        "low rank but for rounding": low.astype("float32"),
        "dead rows": random.normal(size=(8, 30)) * (np.arange(8) % 2)[:, None],
        "ten scales": random.normal(size=(10, 30)) * 10.0 ** -np.arange(10)[:, None],
        "large": random.normal(size=(6, 20)) * 1e20,
        "small": random.normal(size=(6, 20)) * 1e-20,
    }


def finish(inputs, x):
    return randomize(keras.Model(inputs, layers.Dense(2, name="out")(x)))


def activation(model, name, x):
    return np.asarray(keras.Model(model.inputs[0], model.get_layer(name).output)(x))


def rows(maps):
    """Shape (examples, channels, positions) from channels-last maps."""
    return np.moveaxis(maps, -1, 1).reshape(len(maps), maps.shape[-1], -1)


def average(maps):
    return np.mean([explicit(matrix) for matrix in rows(maps)], 0)


def raw(model, data, **options):
    return CHIP(data, normalize="none", **options)(tfprune.analyse(model))


@pytest.mark.parametrize("build", [toys.chain, toys.residual])
def test_contract(build):
    check_criterion(CHIP(DATA), build())


@pytest.mark.parametrize("name", matrices())
def test_leave_one_out_against_singular_values(name):
    matrix = matrices()[name]
    # Relative to the largest singular value: squared in the Gram matrix, one of 1e-8 of it is lost
    # in float64. Where none is so small, the quadrature's 1e-11 is what remains.
    lost = name in ("ten scales", "low rank but for rounding")
    tolerance = (1e-7 if lost else 1e-10) * np.linalg.norm(matrix, 2)
    np.testing.assert_allclose(independence(matrix), explicit(matrix), rtol=0, atol=tolerance)


def test_leave_one_out_by_hand():
    # Ones of 5 x 7 have one singular value, sqrt(35); without a row, sqrt(28).
    np.testing.assert_allclose(
        independence(np.ones((5, 7))), np.full(5, np.sqrt(35) - np.sqrt(28)), rtol=1e-9
    )  # the quadrature, as above
    # Orthogonal rows lose nothing but themselves, and a row of zeros loses nothing at all.
    matrix = np.zeros((4, 6))
    matrix[[0, 1, 2], [0, 2, 5]] = [3, 1, 2]
    np.testing.assert_allclose(independence(matrix), [3, 1, 2, 0], rtol=1e-9)
    np.testing.assert_array_equal(independence(np.zeros((3, 4))), np.zeros(3))
    # A pair of equal rows (norm 5) is one direction of 5 sqrt(2), and of 5 without one of them.
    matrix = np.array([[3.0, 4.0, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 5.0]])
    pair = 5 * np.sqrt(2) - 5
    np.testing.assert_allclose(independence(matrix), [pair, pair, 5], rtol=1e-9)


def test_every_channel_of_a_network():
    """Maps read by a convolution, and those in front of a global pooling."""
    model = toys.chain()
    scores = raw(model, DATA)
    for group, relu in (("conv0", "relu0"), ("conv1", "relu1"), ("conv2", "relu2")):
        expected = average(activation(model, relu, DATA))
        # float32 maps, computed for other sizes of a batch.
        np.testing.assert_allclose(scores[group], expected, rtol=1e-5)
    mean = scores["conv1"].mean()
    np.testing.assert_allclose(
        CHIP(DATA)(tfprune.analyse(model))["conv1"], scores["conv1"] / mean, rtol=1e-12
    )  # one division


def test_residual_stream_is_observed_where_it_is_read():
    model = toys.residual()
    names = [layer.name for layer in model.layers]
    behind_stem = names[names.index("stem_norm") + 1]
    places = [average(activation(model, name, DATA)) for name in (behind_stem, "sum")]
    # float32 maps.
    np.testing.assert_allclose(raw(model, DATA)["stem"], sum(places) / 2, rtol=1e-5)
    np.testing.assert_allclose(
        CHIP(DATA)(tfprune.analyse(model))["stem"],
        sum(place / place.mean() for place in places) / 2,
        rtol=1e-5,
    )


def test_a_filter_that_another_repeats_is_worth_less():
    model = toys.chain()
    graph = tfprune.analyse(model)
    before = CHIP(DATA)(graph)["conv1"]
    for name in ("conv1", "norm1"):
        weights = model.get_layer(name).get_weights()
        for weight in weights:
            weight[..., 7] = weight[..., 2]
        model.get_layer(name).set_weights(weights)
    after = CHIP(DATA)(graph)["conv1"]
    np.testing.assert_allclose(after[7], after[2], rtol=1e-6)  # equal rows of float32 maps
    # Two equal rows are worth sqrt(2) of one, so the second adds 0.41 of what one alone would.
    assert after[2] < 0.6 * before[2]


def test_neighbours_in_a_concatenation_do_not_count():
    inputs = keras.Input((8, 8, 3))
    a = layers.Conv2D(4, 1, name="a")(inputs)
    b = layers.Conv2D(6, 1, name="b")(inputs)
    x = layers.Conv2D(5, 3, name="c")(layers.Concatenate(name="both")([a, b]))
    model = finish(inputs, layers.GlobalAveragePooling2D()(x))
    scores, both = raw(model, DATA), activation(model, "both", DATA)
    # float32 maps; 4 and 6 mixtures of 3 colours, so that even within a group some repeat others.
    np.testing.assert_allclose(scores["a"], average(both[..., :4]), rtol=1e-4)
    np.testing.assert_allclose(scores["b"], average(both[..., 4:]), rtol=1e-4)


def test_several_positions_of_a_channel_lie_side_by_side():
    """Behind a grouped convolution, a channel stands once in every group."""
    inputs = keras.Input((8, 8, 3))
    x = layers.ReLU(name="relu")(layers.Conv2D(8, 3, name="conv")(inputs))
    x = layers.Conv2D(6, 3, groups=2, name="grouped")(x)
    model = finish(inputs, layers.GlobalAveragePooling2D()(x))
    graph = tfprune.analyse(model)
    assert graph["conv"].width == 4
    maps = rows(activation(model, "relu", DATA))
    joined = np.concatenate([maps[:, :4], maps[:, 4:]], axis=2)
    expected = np.mean([explicit(matrix) for matrix in joined], 0)
    # float32 maps.
    np.testing.assert_allclose(raw(model, DATA)["conv"], expected, rtol=1e-5)


def test_channels_with_fewer_positions_than_others():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    x = layers.Concatenate(name="more")([x, layers.ReLU()(x[..., 1:3])])
    x = layers.Conv2D(5, 3)(x)
    model = finish(inputs, layers.GlobalAveragePooling2D()(x))
    maps = rows(activation(model, "more", DATA))
    joined = np.zeros((len(maps), 4, 2 * maps.shape[2]))
    joined[:, :, : maps.shape[2]] = maps[:, :4]
    joined[:, 1:3, maps.shape[2] :] = maps[:, 4:]
    expected = np.mean([explicit(matrix) for matrix in joined], 0)
    # float32 maps.
    np.testing.assert_allclose(raw(model, DATA)["conv"], expected, rtol=1e-5)


@pytest.mark.parametrize("count", [4, 100])
def test_units_without_a_map_have_the_examples_for_columns(count):
    """Fewer examples than units, and so many that they are gathered on the way."""
    inputs = keras.Input((9,))
    x = layers.ReLU(name="relu")(layers.Dense(7, name="hidden")(inputs))
    model = finish(inputs, x)
    data = np.random.default_rng(0).standard_normal((count, 9)).astype("float32")
    expected = explicit(activation(model, "relu", data).T) / np.sqrt(count)
    scores = raw(model, data, batch_size=20)["hidden"]
    # float32 activations, relative to the largest: with few examples a unit may be silent.
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5 * expected.max())
    assert np.ptp(expected) > 0.1


def test_sequences():
    inputs = keras.Input((10, 3))
    x = layers.Conv1D(6, 3, activation="relu", name="conv")(inputs)
    model = finish(inputs, layers.GlobalAveragePooling1D()(layers.Conv1D(4, 3)(x)))
    data = np.random.default_rng(0).standard_normal((5, 10, 3)).astype("float32")
    # float32 maps.
    expected = average(activation(model, "conv", data))
    np.testing.assert_allclose(raw(model, data)["conv"], expected, rtol=1e-5)


def test_limits_and_kinds_of_data():
    model = toys.chain()
    data = toys.images(40)  # more than the model sees at once
    first = raw(model, data[:10])["conv1"]
    for limited in (
        raw(model, data, batches=2, batch_size=5),
        raw(model, (data, toys.labels(40)), batches=1, batch_size=10),
        raw(model, tf.data.Dataset.from_tensor_slices(data).batch(5).repeat(), batches=2),
    ):
        # float32 maps, computed for other sizes of a batch.
        np.testing.assert_allclose(limited["conv1"], first, rtol=1e-5)
    halves = [raw(model, half)["conv1"] for half in (data[:20], data[20:])]
    np.testing.assert_allclose(raw(model, data)["conv1"], sum(halves) / 2, rtol=1e-5)
    assert "CHIP, 2 batches" in CHIP(data, batch_size=20)(tfprune.analyse(model)).criterion
    assert (CHIP(data).batches, CHIP(data).batch_size) == (5, 128)


def test_data_that_cannot_be_used():
    graph = tfprune.analyse(toys.chain())
    with pytest.raises(tfprune.TfpruneError, match="empty"):
        CHIP(DATA[:0])(graph)
    with pytest.raises(tfprune.TfpruneError, match="Expected batches of shape"):
        CHIP(DATA[:, :4])(graph)
    with pytest.raises(tfprune.TfpruneError, match="positive batch_size"):
        CHIP(DATA, batch_size=0)(graph)
    with pytest.raises(tfprune.TfpruneError, match="NaN or infinity at the input of 'conv1'"):
        CHIP(np.full_like(DATA, np.inf))(graph)
    with pytest.raises(tfprune.TfpruneError, match="Expected data for criterion 'chip'"):
        tfprune.criteria.get("chip")


def test_the_model_is_only_read():
    model = toys.residual()
    before = [np.array(w) for w in model.get_weights()]
    CHIP(DATA)(tfprune.analyse(model))
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
