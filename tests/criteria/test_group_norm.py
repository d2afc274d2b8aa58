"""Group norm: every slice that goes with a channel, spelled out."""

import keras
import numpy as np
import pytest

import tfprune
from tests import toys
from tfprune.criteria import L2, GroupNorm
from tfprune.testing import check_criterion, randomize

RAW = {"reduce": "sum", "normalize": "none"}


def weight(model, layer, name="kernel"):
    return np.asarray(getattr(model.get_layer(layer), name), np.float64)


def squares(kernel, axis):
    others = tuple(a for a in range(kernel.ndim) if a != axis % kernel.ndim)
    return (kernel**2).sum(others)


@pytest.mark.parametrize("build", [toys.chain, toys.residual])
@pytest.mark.parametrize("criterion", [GroupNorm(), GroupNorm(p=1, normalize="max")])
def test_contract(criterion, build):
    check_criterion(criterion, build())


def test_by_hand():
    inputs = keras.Input((2,))
    x = keras.layers.Dense(2, name="made")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(1, name="read")(x))
    model.get_layer("made").set_weights([np.array([[1.0, -2.0], [3.0, 4.0]]), np.array([9.0, 9.0])])
    model.get_layer("read").set_weights([np.array([[5.0], [-6.0]]), np.array([9.0])])
    graph = tfprune.analyse(model)
    # Whole numbers: exact. Biases do not count.
    total = np.array([1 + 9 + 25, 4 + 16 + 36], np.float64)
    np.testing.assert_array_equal(GroupNorm(**RAW)(graph)["made"], total)
    np.testing.assert_array_equal(GroupNorm(normalize="none")(graph)["made"], total / 2)
    mean = (35 + 56) / 2
    # One division in another order.
    np.testing.assert_allclose(GroupNorm()(graph)["made"], [35 / mean, 56 / mean], rtol=1e-15)
    np.testing.assert_array_equal(GroupNorm(p=1, **RAW)(graph)["made"], [1 + 3 + 5, 2 + 4 + 6])


def test_producer_scale_and_consumer():
    model = toys.chain()
    expected = (
        squares(weight(model, "conv1"), 3)
        + weight(model, "norm1", "gamma") ** 2
        + squares(weight(model, "conv2"), 2)
    )
    # The same float64 sums in another order.
    scores = GroupNorm(**RAW)(tfprune.analyse(model))["conv1"]
    np.testing.assert_allclose(scores, expected, rtol=1e-12)


def test_residual():
    """Both producers of the sum, the scale, a convolution and a head behind a flatten."""
    model = toys.residual()
    graph = tfprune.analyse(model)
    head = weight(model, "head").reshape(64, 16, 5)  # rows of a channel: one per position
    stem = (
        squares(weight(model, "stem"), 3)
        + squares(weight(model, "project"), 3)
        + weight(model, "stem_norm", "gamma") ** 2
        + squares(weight(model, "expand"), 2)
        + (head**2).sum((0, 2))
    )
    # The block inside: made twice (the gate), filtered by the depthwise kernel, read twice.
    inner = (
        squares(weight(model, "expand"), 3)
        + squares(weight(model, "excite"), 3)
        + squares(weight(model, "depthwise"), 2)
        + squares(weight(model, "squeeze"), 2)
        + squares(weight(model, "project"), 2)
    )
    scores = GroupNorm(**RAW)(graph)
    # The same float64 sums in another order.
    np.testing.assert_allclose(scores["stem"], stem, rtol=1e-12)
    np.testing.assert_allclose(scores["expand"], inner, rtol=1e-12)
    # The code's mean over the five members, over the group's mean.
    np.testing.assert_allclose(GroupNorm()(graph)["stem"], stem / stem.mean(), rtol=1e-12)
    np.testing.assert_allclose(GroupNorm(normalize="none")(graph)["stem"], stem / 5, rtol=1e-12)


def test_coupled_layers_share_one_index_set():
    model = toys.residual()
    plan = tfprune.plan(model, {"stem": 0.5}, criterion="group_norm", round_to=1)
    small = plan.apply(model)
    kept = np.sort(np.argsort(GroupNorm()(tfprune.analyse(model))["stem"])[8:])
    for layer in ("stem", "project"):
        np.testing.assert_array_equal(weight(small, layer), weight(model, layer)[..., kept])
    np.testing.assert_array_equal(weight(small, "expand"), weight(model, "expand")[:, :, kept])


def test_a_reader_of_a_concatenation_adds_its_slice_alone():
    inputs = keras.Input((4, 4, 3))
    a = keras.layers.Conv2D(4, 1, name="a")(inputs)
    b = keras.layers.Conv2D(6, 1, name="b")(inputs)
    x = keras.layers.Conv2D(5, 3, name="c")(keras.layers.Concatenate()([a, b]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = randomize(keras.Model(inputs, keras.layers.Dense(2, name="d")(x)))
    scores = GroupNorm(**RAW)(tfprune.analyse(model))
    read = squares(weight(model, "c"), 2)
    # The same float64 sums in another order.
    np.testing.assert_allclose(scores["a"], squares(weight(model, "a"), 3) + read[:4], rtol=1e-12)
    np.testing.assert_allclose(scores["b"], squares(weight(model, "b"), 3) + read[4:], rtol=1e-12)


def test_follows_a_permutation_of_the_channels():
    model = toys.chain()
    graph = tfprune.analyse(model)
    before = GroupNorm()(graph)["conv1"]
    order = np.random.default_rng(0).permutation(12)
    conv, norm, after = (model.get_layer(n) for n in ("conv1", "norm1", "conv2"))
    conv.set_weights([conv.get_weights()[0][..., order], conv.get_weights()[1][order]])
    norm.set_weights([w[order] for w in norm.get_weights()])
    after.set_weights([after.get_weights()[0][:, :, order], after.get_weights()[1]])
    # The mean adds the same numbers in another order.
    np.testing.assert_allclose(GroupNorm()(graph)["conv1"], before[order], rtol=1e-12)


def test_members_are_not_brought_to_one_size():
    """A small kernel says little beside a large one; L2 lets both say the same."""
    model = toys.chain()
    graph = tfprune.analyse(model)
    conv = model.get_layer("conv1")
    conv.kernel.assign(conv.kernel * 1e-4)
    rest = weight(model, "norm1", "gamma") ** 2 + squares(weight(model, "conv2"), 2)
    # The kernel's share is of the order of its square, 1e-8.
    np.testing.assert_allclose(GroupNorm(**RAW)(graph)["conv1"], rest, rtol=1e-6)
    order = np.argsort(GroupNorm()(graph)["conv1"])
    assert not np.array_equal(order, np.argsort(L2(consumers=True)(graph)["conv1"]))


@pytest.mark.parametrize("p", [0, -1, float("nan"), float("inf")])
def test_powers_that_are_none(p):
    with pytest.raises(tfprune.TfpruneError, match="Expected p to be a positive number"):
        GroupNorm(p=p)(tfprune.analyse(toys.chain()))


@pytest.mark.parametrize("criterion", [GroupNorm(reduce="median"), GroupNorm(normalize="z")])
def test_unknown_choices(criterion):
    with pytest.raises(tfprune.TfpruneError, match="Expected"):
        criterion(tfprune.analyse(toys.chain()))


def test_the_model_is_only_read():
    model = toys.residual()
    before = [np.array(w) for w in model.get_weights()]
    GroupNorm()(tfprune.analyse(model))
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
