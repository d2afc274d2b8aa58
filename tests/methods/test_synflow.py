"""Synaptic flow: the golden example, its conservation, and what the steps are for."""

from __future__ import annotations

from itertools import pairwise

import keras
import numpy as np
import pytest

from tests.methods.models import mlp, same, snapshot
from tests.toys import chain, residual
from tfprune.errors import ArgumentError, ModelError
from tfprune.layers import Masks, prunable_weights, with_masks
from tfprune.methods import SynFlow
from tfprune.zoo import resnet_cifar


def _golden(activation="relu", head=None):
    dense = keras.layers.Dense
    model = keras.Sequential(
        [
            keras.Input((2,)),
            dense(2, activation, use_bias=False, name="fc1"),
            dense(1, head, use_bias=False, name="fc2"),
        ]
    )
    model.set_weights([np.array([[1, -2], [3, 0.5]]), np.array([[-1], [2]])])
    return model


def test_the_golden_example() -> None:
    # |W1| = [[1, 2], [3, .5]], |W2| = [[1], [2]]: hidden (1 + 3, 2 + .5), R = 4 + 2 * 2.5
    scores = SynFlow(0.5).scores(_golden())

    np.testing.assert_array_equal(
        scores["fc1/kernel"], [[1 * 1, 2 * 2], [3 * 1, 0.5 * 2]]
    )  # |w| times what follows
    np.testing.assert_array_equal(scores["fc2/kernel"], [[4 * 1], [2.5 * 2]])
    assert scores["fc1/kernel"].sum() == scores["fc2/kernel"].sum() == 9


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "swish", "relu6", "gelu", "elu"])
def test_activations_become_homogeneous(activation) -> None:
    expected = SynFlow(0.5).scores(_golden())
    scores = SynFlow(0.5).scores(_golden(activation, "sigmoid"))

    for path in expected:
        np.testing.assert_array_equal(scores[path], expected[path])


def test_activations_that_stand_alone_become_homogeneous() -> None:
    layers, ops = keras.layers, keras.ops
    expected = SynFlow(0.5).scores(_golden())
    for function in (
        layers.ReLU(max_value=3.0),
        layers.Activation("tanh"),
        layers.LeakyReLU(),
        ops.relu6,
        ops.silu,
        ops.hard_silu,
        ops.tanh,
        layers.Softmax(),
        layers.Rescaling(1 / 255, -1.0),
    ):
        dense = _golden("linear").layers
        inputs = keras.Input((2,))
        hidden = layers.Dense(2, use_bias=False, name="fc1")
        out = layers.Dense(1, use_bias=False, name="fc2")
        model = keras.Model(inputs, ops.sigmoid(out(function(hidden(inputs)))))
        hidden.kernel.assign(dense[0].kernel)
        out.kernel.assign(dense[1].kernel)

        scores = SynFlow(0.5).scores(model)

        for path in expected:
            np.testing.assert_array_equal(scores[path], expected[path], str(function))


def test_flow_is_conserved_layer_by_layer_and_unit_by_unit() -> None:
    model = mlp(widths=(9, 8, 7), bias=False)
    scores = list(SynFlow(0.5).scores(model).values())
    sums = [s.sum() for s in scores]

    # float64 sums of at most 72 positive terms
    np.testing.assert_allclose(sums, sums[0], rtol=1e-13)
    for into, out in pairwise(scores):
        np.testing.assert_allclose(into.sum(0), out.sum(1), rtol=1e-13)


def test_flow_is_conserved_through_convolutions_and_batch_normalisation() -> None:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(6, 3, padding="same", use_bias=False, name="conv1"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Conv2D(5, 3, use_bias=False, name="conv2"),
            layers.BatchNormalization(),
            layers.Activation("swish"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4, "softmax", use_bias=False, name="head"),
        ]
    )
    sums = [s.sum() for s in SynFlow(0.5).scores(model).values()]

    # float64 sums of at most some thousand positive terms
    np.testing.assert_allclose(sums, sums[0], rtol=1e-12)


def test_it_counts_exactly_and_a_step_keeps_what_the_step_before_kept() -> None:
    model = mlp(widths=(30, 20), features=20, bias=False)
    total = 20 * 30 + 30 * 20 + 20 * 3

    masks = SynFlow(0.9, iterations=10).masks(model)

    assert masks.kept == round(total * (1 - 0.9))
    # With one step the scores are those of the whole network.
    method = SynFlow(0.5, iterations=1)
    scores = np.concatenate([s.ravel() for s in method.scores(model).values()])
    kept = np.concatenate([m.ravel() for m in method.masks(model).values()])
    assert scores[kept].min() >= scores[~kept].max()


def test_the_second_step_scores_the_masked_network() -> None:
    model = mlp(widths=(12, 10), bias=False)
    method = SynFlow(0.75, iterations=2)
    first = SynFlow(0.5, iterations=1).masks(model)  # sqrt(1 - .75) = .5 stay

    scores = method.scores(model, first)
    flat = np.concatenate([np.where(first[p], s, -1).ravel() for p, s in scores.items()])
    kept = np.concatenate([m.ravel() for m in method.masks(model).values()])

    assert kept.sum() == round(kept.size * 0.25)
    assert flat[kept].min() >= flat[~kept].max()
    for path, score in scores.items():
        assert not score[~first[path]].any()


def test_what_went_does_not_come_back_for_what_was_cut_off() -> None:
    # round(6 * .5 ** (k / 5)) = 5, 5, 4, 3, 3 weights stay. In the fourth step three of the scores
    # W1[0, 1] = W2[1] = 4, W1[1, 0] = W2[0] = 3: W2[0] goes, and cuts W1[1, 0] off. In the fifth
    # that scores 0, like those before it in order which went first.
    masks = SynFlow(0.5, iterations=5).masks(_golden())

    np.testing.assert_array_equal(masks["fc1/kernel"], [[False, True], [True, False]])
    np.testing.assert_array_equal(masks["fc2/kernel"], [[False], [True]])


def test_steps_prevent_the_collapse_of_layers() -> None:
    # The layers in the middle have so many weights that each carries little.
    model = mlp(widths=(4, 300, 300, 4), features=4, classes=2, bias=False)
    total = 4 * 4 + 4 * 300 + 300 * 300 + 300 * 4 + 4 * 2
    sparsity = 1 - 12 / total

    with pytest.raises(ArgumentError, match=r"nothing of .*'fc3/kernel'"):
        SynFlow(sparsity, iterations=1).masks(model)
    masks = SynFlow(sparsity, iterations=100).masks(model)

    assert masks.count == total
    assert masks.kept == 12
    assert not masks.empty
    # Something still passes from end to end.
    assert np.abs(masks.apply(_positive(model))(np.ones((1, 4), "float32"))).max() > 0


def _positive(model):
    model.set_weights([np.abs(value) for value in model.get_weights()])
    return model


def test_fewer_weights_than_layers_must_empty_one() -> None:
    model = mlp(bias=False)
    total = 7 * 6 + 6 * 5 + 5 * 4 + 4 * 3

    with pytest.raises(ArgumentError, match="nothing of"):
        SynFlow(1 - 3 / total).masks(model)
    # Four weights are a path.
    masks = SynFlow(1 - 4 / total).masks(model)
    assert [int(mask.sum()) for mask in masks.values()] == [1, 1, 1, 1]
    path = [np.argwhere(mask)[0] for mask in masks.values()]
    assert [into for into, _ in path[1:]] == [out for _, out in path[:-1]]


def test_resnet_56_leaves_the_range_of_float32() -> None:
    model = resnet_cifar(56, seed=0)
    scores = SynFlow(0.9).scores(model)

    flow = scores["stem_conv/kernel"].sum()
    assert flow > float(np.finfo(np.float32).max)
    assert all(np.isfinite(s).all() and s.max() > 0 for s in scores.values())
    # All passes the stem and the head. 1e-9: float64 sums of some 10^5 positive terms, 56 deep.
    assert list(scores.values())[-1].sum() == pytest.approx(flow, rel=1e-9)


def test_what_float64_cannot_hold_is_refused() -> None:
    model = mlp(widths=(4, 4), bias=False)
    for kernel in prunable_weights(model).values():
        kernel.assign(np.full(tuple(kernel.shape), 1e38, "float32"))
    deep = keras.Sequential([keras.Input((7,)), *model.layers[:1]])
    for number in range(9):
        deep.add(keras.layers.Dense(4, use_bias=False, name=f"more{number}"))
        deep.layers[-1].kernel.assign(np.full((4, 4), 1e38, "float32"))

    with pytest.raises(ModelError, match="float64 can hold"):
        SynFlow(0.5).scores(deep)


@pytest.mark.parametrize("make", [chain, residual, lambda: mlp(head="softmax")])
def test_the_model_is_never_touched(make) -> None:
    model = make()
    before = snapshot(model)
    layers = list(model.layers)

    SynFlow(0.5, iterations=3).masks(model)

    assert same(before, model)
    assert model.layers == layers
    assert {str(v.dtype) for v in model.trainable_variables} == {"float32"}


def test_a_wrapped_model_is_scored_with_its_masks() -> None:
    model = mlp(bias=False)
    masks = Masks.over(model, {"fc1/kernel": np.eye(7, 6) > 0})

    scores = SynFlow(0.5).scores(with_masks(model, masks))

    expected = SynFlow(0.5).scores(model, masks)
    for path in expected:
        np.testing.assert_array_equal(scores[path], expected[path])


def _recurrent():
    return keras.Sequential([keras.Input((4, 3)), keras.layers.LSTM(2, name="lstm")])


def _normalised():
    layers = keras.layers
    return keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.LayerNormalization()])


def _words():
    layers = keras.layers
    return keras.Sequential([keras.Input((4,), dtype="int32"), layers.Embedding(5, 3)])


def _free():
    layers = keras.layers
    inputs = keras.Input((None, None, 3), name="image")
    x = layers.Conv2D(4, 3, use_bias=False, name="conv")(inputs)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_recurrent, r"'lstm' \(LSTM\).*Use SNIP or GraSP"),
        (_normalised, "LayerNormalization"),
        (_words, "inputs that are floats.*int32"),
        (_free, r"'image' of shape \(None, None, None, 3\). Pass input_shape="),
    ],
)
def test_networks_without_a_flow_are_refused(make, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        SynFlow(0.5).masks(make())


def test_free_sizes_can_be_given() -> None:
    masks = SynFlow(0.5, input_shape=(8, 8, 3)).masks(_free())

    assert masks.kept == 3 * 3 * 3 * 4 // 2


def test_nested_models_are_walked() -> None:
    inner = keras.Sequential([keras.Input((2,)), _golden().layers[0]], name="block")
    model = keras.Sequential([keras.Input((2,)), inner, _golden().layers[1]])

    scores = SynFlow(0.5).scores(model)

    assert list(scores) == ["block/fc1/kernel", "fc2/kernel"]
    np.testing.assert_array_equal(scores["fc2/kernel"], [[4.0], [5.0]])
