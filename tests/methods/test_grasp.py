"""Gradient flow: against a Hessian that is written out."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.methods.models import mlp, rows, same, snapshot
from tests.toys import chain, images, labels
from tfprune.errors import ArgumentError
from tfprune.layers import prunable_weights
from tfprune.methods import GraSP
from tfprune.methods.gradients import hessian_product, mean_gradient

DATA = rows(count=20, features=3)


def _tanh_net(head=None):
    """Smooth, so that the second derivatives are more than those of the loss."""
    keras.utils.set_random_seed(3)
    dense = keras.layers.Dense
    return keras.Sequential(
        [keras.Input((3,)), dense(4, "tanh", name="fc"), dense(3, head, name="head")]
    )


def _written_out(model, x, y, temperature):
    """w, gradient and Hessian of the mean loss over both kernels, as vectors, in float64."""
    layers = [model.get_layer("fc"), model.get_layer("head")]
    biases = [tf.constant(np.asarray(layer.bias), tf.float64) for layer in layers]
    kernels = [np.asarray(layer.kernel).astype(np.float64) for layer in layers]
    w = tf.Variable(np.concatenate([k.ravel() for k in kernels]))
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            first = tf.reshape(w[:12], (3, 4))
            second = tf.reshape(w[12:], (4, 3))
            hidden = tf.tanh(tf.constant(x, tf.float64) @ first + biases[0])
            logits = (hidden @ second + biases[1]) / temperature
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits))
        gradient = inner.gradient(loss, w)
    return w.numpy(), gradient.numpy(), outer.jacobian(gradient, w).numpy()


def test_the_product_is_that_with_the_hessian() -> None:
    model, (x, y) = _tanh_net(), DATA
    _, gradient, hessian = _written_out(model, x, y, 1.0)
    variables = list(prunable_weights(model).values())
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    vector = np.random.default_rng(0).standard_normal(24)
    parts = [vector[:12].reshape(3, 4), vector[12:].reshape(4, 3)]

    found = mean_gradient(model, variables, [DATA], loss, False)
    product = hessian_product(model, variables, [DATA], loss, False, parts)

    expected = hessian @ vector
    # float32, sums of some 20 terms
    flat = np.concatenate([p.ravel() for p in found])
    np.testing.assert_allclose(flat, gradient, atol=1e-6 * abs(gradient).max() * 10)
    flat = np.concatenate([p.ravel() for p in product])
    np.testing.assert_allclose(flat, expected, atol=1e-5 * abs(expected).max())
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_scores_are_minus_w_times_the_hessian_times_the_gradient(temperature) -> None:
    model, (x, y) = _tanh_net(), DATA
    w, gradient, hessian = _written_out(model, x, y, temperature)
    expected = -w * (hessian @ gradient)
    expected /= abs(expected).sum()

    scores = GraSP(0.5, DATA, temperature=temperature).scores(model)

    flat = np.concatenate([s.ravel() for s in scores.values()])
    # At T = 200 probabilities are equal to 1e-3, and float32 loses three digits in p (1 - p) terms.
    np.testing.assert_allclose(flat, expected, atol=1e-4 * abs(expected).max())


def test_halves_and_batches_make_the_same_mean_without_batch_normalisation() -> None:
    model = _tanh_net()
    whole = GraSP(0.5, DATA, batch_size=20).scores(model)
    parts = GraSP(0.5, DATA, batch_size=7).scores(model)

    for path in whole:
        np.testing.assert_allclose(parts[path], whole[path], atol=1e-4 * abs(whole[path]).max())


def test_the_largest_scores_go_and_the_count_is_exact() -> None:
    model = _tanh_net()
    method = GraSP(0.4, DATA)
    scores = np.concatenate([s.ravel() for s in method.scores(model).values()])

    kept = np.concatenate([m.ravel() for m in method.masks(model).values()])

    assert kept.sum() == round(24 * (1 - 0.4))
    assert scores[kept].max() <= scores[~kept].min()


def test_a_softmax_at_the_end_is_taken_off() -> None:
    linear, probabilities = _tanh_net(), _tanh_net("softmax")
    probabilities.set_weights(linear.get_weights())
    apart = keras.Sequential([keras.Input((3,)), *_tanh_net().layers, keras.layers.Softmax()])
    expected = GraSP(0.5, DATA).scores(linear)

    for model in (probabilities, apart):
        scores = GraSP(0.5, DATA).scores(model)
        for path in expected:
            np.testing.assert_array_equal(scores[path], expected[path])


def test_statistics_of_the_batch_are_used_and_not_left_behind() -> None:
    model = chain()
    before = snapshot(model)
    data = images(), labels()
    scores = GraSP(0.5, data).scores(model)
    assert same(before, model)

    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.moving_mean.assign(layer.moving_mean + 3.0)
    shifted = GraSP(0.5, data).scores(model)

    for path in scores:
        np.testing.assert_array_equal(scores[path], shifted[path])


def test_dropout_is_drawn_from_the_seed() -> None:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((3,)),
            layers.Dense(8, "tanh", name="fc"),
            layers.Dropout(0.5),
            layers.Dense(3, name="head"),
        ]
    )

    def scores(seed):
        return GraSP(0.5, DATA, seed=seed).scores(model)["fc/kernel"]

    np.testing.assert_array_equal(scores(1), scores(1))
    assert not np.array_equal(scores(1), scores(2))


def test_dense_kernels_are_redrawn_on_request_in_the_copy() -> None:
    model = mlp(features=3)
    before = snapshot(model)

    def scores(**options):
        return GraSP(0.5, DATA, **options).scores(model)["head/kernel"]

    redrawn = scores(redraw_dense=True)
    assert not np.array_equal(scores(), redrawn)
    np.testing.assert_array_equal(scores(redraw_dense=True), redrawn)
    assert not np.array_equal(scores(redraw_dense=True, seed=1), redrawn)
    assert same(before, model)


@pytest.mark.parametrize(
    "arguments", [{"temperature": 0.0}, {"temperature": float("inf")}, {"batch_size": 1}]
)
def test_arguments_out_of_range(arguments) -> None:
    with pytest.raises(ArgumentError):
        GraSP(0.5, DATA, **arguments)
