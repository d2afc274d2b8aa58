"""The global rule with its index, rounds, and the drawing anew."""

from __future__ import annotations

import math

import keras
import numpy as np
import pytest

from tests.methods.models import lenet_5, mlp, same, snapshot
from tests.toys import chain, residual
from tfprune.errors import ArgumentError
from tfprune.layers import Masks, prunable_weights
from tfprune.methods import GlobalMagnitude, redrawn
from tfprune.methods.global_magnitude import convolutions, global_masks


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.7, 0.95, 0.999])
def test_one_more_than_the_index_goes(ratio) -> None:
    count = 5504
    random = np.random.default_rng(0)
    magnitudes = random.permutation(np.arange(1, count + 1)) * random.choice([-1, 1], count)
    weights = {"a": magnitudes[:5000].reshape(50, 100).astype(float), "b": magnitudes[5000:] / 1.0}

    masks = global_masks(weights, ratio)

    index = int(count * ratio)
    for path, weight in weights.items():
        # The magnitudes are 1 to N, so sorted[index] is index + 1.
        np.testing.assert_array_equal(masks[path], np.abs(weight) > index + 1)
    assert sum(int(m.sum()) for m in masks.values()) == count - index - 1


def test_what_ties_with_the_threshold_goes() -> None:
    # sorted: 1 1 1 2 3, index int(5 * .2) = 1, t = 1
    masks = global_masks({"a": np.array([1.0, -1.0, 2.0, 1.0, -3.0])}, 0.2)

    np.testing.assert_array_equal(masks["a"], [False, False, True, False, True])


def test_zeros_go_whatever_the_ratio() -> None:
    masks = global_masks({"a": np.array([0.0, 0.0, 2.0, 1.0])}, 0.0)

    np.testing.assert_array_equal(masks["a"], [False, False, True, True])


def test_in_rounds_the_index_counts_from_what_is_gone() -> None:
    magnitudes = np.arange(1.0, 101.0)
    gone = magnitudes % 4 == 0  # 25 zeros, spread over all sizes
    weights, left = {"a": np.where(gone, 0.0, magnitudes)}, {"a": ~gone}

    masks = global_masks(weights, 0.4, left)

    # index = (N - nnz) + int(nnz p) = 25 + int(75 * .4); that one goes too.
    expected = np.sort(weights["a"])[25 + 30]
    np.testing.assert_array_equal(masks["a"], weights["a"] > expected)
    assert masks["a"].sum() == 75 - 30 - 1


def test_a_masked_weight_is_gone_whatever_its_value() -> None:
    weights = {"a": np.array([9.0, 1.0, 2.0, 3.0])}
    masks = global_masks(weights, 0.0, {"a": np.array([False, True, True, True])})

    np.testing.assert_array_equal(masks["a"], [False, False, True, True])


def test_only_convolutions_are_ranked_unless_asked() -> None:
    model = lenet_5()
    plain, everything = GlobalMagnitude(0.5).masks(model), GlobalMagnitude(0.5, dense=True)

    assert [path for path, s in plain.sparsities.items() if s] == ["conv1/kernel", "conv2/kernel"]
    count = 20 * 25 + 50 * 20 * 25
    assert plain.count - plain.kept == count // 2 + 1
    # Initial values are all different, or the count would be another.
    total = 430_500
    masks = everything.masks(model)
    assert masks.count - masks.kept == total // 2 + 1
    assert masks.sparsities["fc1/kernel"] > 0


def test_which_kernels_are_convolutions() -> None:
    names = ("stem", "expand", "squeeze", "excite", "project")

    assert convolutions(residual()) == [f"{name}/kernel" for name in names]

    layers = keras.layers
    inputs = keras.Input((8, 8, 4))
    x = layers.SeparableConv2D(4, 3, name="separable")(inputs)
    x = layers.Conv2DTranspose(4, 3, name="transpose")(x)
    x = layers.Reshape((64, 4))(x)
    x = layers.MultiHeadAttention(2, 2, name="attention")(x, x)
    model = keras.Model(inputs, layers.EinsumDense("abc,cd->abd", (None, 3), name="einsum")(x))
    assert convolutions(model) == ["separable/pointwise_kernel", "transpose/kernel"]
    assert len(prunable_weights(model)) == 2 + 4 + 1


def test_an_emptied_layer_is_refused_by_name() -> None:
    model = chain()
    kernel = prunable_weights(model)["conv1/kernel"]
    kernel.assign(np.asarray(kernel) * 1e-6)

    with pytest.raises(ArgumentError, match="nothing of 'conv1/kernel'"):
        GlobalMagnitude(0.8).masks(model)
    masks = GlobalMagnitude(0.8, allow_empty_layers=True).masks(model)
    assert masks.empty == ["conv1/kernel"]


def test_rounds_reach_the_sparsity_by_equal_fractions() -> None:
    model = mlp(widths=(60, 50), features=40)
    method = GlobalMagnitude(0.8, dense=True, rounds=3)
    masks, total = None, 40 * 60 + 60 * 50 + 50 * 3
    left = total
    ratio = 1 - 0.2 ** (1 / 3)
    for number in range(3):
        masks = method.masks(model, number, masks)
        left -= int(left * ratio) + 1
        assert masks.kept == left
    # Every round removes at most one weight more than its share.
    assert 0 <= masks.sparsity - 0.8 <= 3 / total


def test_redrawn_weights_have_the_deviation_of_the_fan_out_that_is_left() -> None:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 32))
    x = keras.layers.Conv2D(128, 3, name="conv")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(4, name="head")(x))
    random = np.random.default_rng(0)
    masks = Masks.over(model, {"conv/kernel": random.random((3, 3, 32, 128)) < 0.25})
    before = snapshot(model)

    scratch = redrawn(model, masks, seed=1)

    assert same(before, model)
    assert Masks.of_zeros(scratch) == masks
    kernel = np.asarray(prunable_weights(scratch)["conv/kernel"])[masks["conv/kernel"]]
    left = int(masks["conv/kernel"].sum())
    deviation = math.sqrt(2 / (left / 32))
    # Four standard errors of a standard deviation, s / sqrt(2 n), and of a mean, s / sqrt(n).
    assert abs(kernel.std() - deviation) < 4 * deviation / math.sqrt(2 * left)
    assert abs(kernel.mean()) < 4 * deviation / math.sqrt(left)
    np.testing.assert_array_equal(scratch.get_layer("head").kernel, model.get_layer("head").kernel)


def test_redrawing_depends_on_the_seed_alone() -> None:
    model = chain()
    masks = GlobalMagnitude(0.5).masks(model)

    first, again, other = (redrawn(model, masks, seed=seed) for seed in (1, 1, 2))

    assert same(snapshot(first), again)
    assert not np.array_equal(first.get_layer("conv0").kernel, other.get_layer("conv0").kernel)


def test_a_kernel_without_weights_cannot_be_redrawn() -> None:
    model = chain()
    masks = Masks.over(model, {"conv1/kernel": np.zeros((3, 3, 8, 12), bool)})

    with pytest.raises(ArgumentError, match="nothing of 'conv1/kernel'"):
        redrawn(model, masks)


@pytest.mark.parametrize(
    "arguments", [{"sparsity": 1.0}, {"sparsity": 0.5, "rounds": 0}, {"sparsity": -1}]
)
def test_arguments_out_of_range(arguments) -> None:
    with pytest.raises(ArgumentError):
        GlobalMagnitude(**arguments)
