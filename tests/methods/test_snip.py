"""Connection sensitivity: against gates that are really there."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.methods.models import mlp, rows, same, snapshot
from tests.toys import chain, images, labels
from tfprune.errors import ArgumentError, DataError, ModelError
from tfprune.methods import SNIP

DATA = rows()


def _gate_gradients(model, x, y):
    """|dL/dc| of the written-out network with a gate c = 1 on every weight."""
    dense = [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]
    weights = [tf.constant(np.asarray(layer.kernel), tf.float64) for layer in dense]
    biases = [tf.constant(np.asarray(layer.bias), tf.float64) for layer in dense]
    gates = [tf.ones_like(weight) for weight in weights]
    with tf.GradientTape() as tape:
        tape.watch(gates)
        h = tf.constant(x, tf.float64)
        for number, (c, w, b) in enumerate(zip(gates, weights, biases, strict=True)):
            h = h @ (c * w) + b
            if number < len(gates) - 1:
                h = tf.nn.relu(h)
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, h))
    return [np.asarray(gradient) for gradient in tape.gradient(loss, gates)]


def test_scores_are_the_gradients_of_gates() -> None:
    model = mlp()
    gradients = [np.abs(g) for g in _gate_gradients(model, *DATA)]
    total = sum(g.sum() for g in gradients)

    scores = SNIP(0.5, DATA).scores(model)

    for score, gradient in zip(scores.values(), gradients, strict=True):
        # float32 gradients through four layers of sums of at most 24 terms; the scores are
        # compared to the largest, as small ones are differences of large ones.
        np.testing.assert_allclose(score, gradient / total, atol=1e-5 * gradient.max() / total)
    assert sum(s.sum() for s in scores.values()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("sparsity", [0.0, 0.31, 0.9])
def test_exactly_kappa_connections_stay_the_most_sensitive(sparsity) -> None:
    model = mlp()
    method = SNIP(sparsity, DATA, allow_empty_layers=True)
    scores = np.concatenate([s.ravel() for s in method.scores(model).values()])

    masks = method.masks(model)

    kept = np.concatenate([m.ravel() for m in masks.values()])
    assert kept.sum() == round(scores.size * (1 - sparsity))
    assert sparsity == 0 or scores[kept].min() >= scores[~kept].max()


def test_batches_are_summed_before_the_absolute_value() -> None:
    model = mlp()
    x, y = DATA
    sizes = (7, 7, 7, 3)
    parts = np.split(np.arange(24), np.cumsum(sizes)[:-1])
    sums = [0.0] * 4
    for part in parts:
        for i, gradient in enumerate(_gate_gradients(model, x[part], y[part])):
            sums[i] = sums[i] + gradient * len(part) / 24
    total = sum(np.abs(s).sum() for s in sums)

    scores = SNIP(0.5, DATA, batches=None, batch_size=7).scores(model)
    whole = SNIP(0.5, DATA).scores(model)

    for score, one, expected in zip(scores.values(), whole.values(), sums, strict=True):
        tolerance = 1e-5 * np.abs(expected).max() / total  # float32, as above
        np.testing.assert_allclose(score, np.abs(expected) / total, atol=tolerance)
        # One batch or four, the mean loss is the same.
        np.testing.assert_allclose(score, one, atol=tolerance)


def test_only_as_many_batches_as_asked_are_read() -> None:
    model = mlp()
    x, y = DATA
    first = SNIP(0.5, (x[:7], y[:7])).scores(model)
    limited = SNIP(0.5, DATA, batch_size=7).scores(model)

    for path in first:
        np.testing.assert_array_equal(first[path], limited[path])


def test_batch_normalisation_works_by_its_statistics() -> None:
    model = chain()
    before = snapshot(model)
    x, y = images(), labels()
    whole = SNIP(0.5, (x, y)).scores(model)
    parts = SNIP(0.5, (x, y), batches=None, batch_size=5).scores(model)

    assert same(before, model)
    for path in whole:
        # With statistics of the batch, the cut would show in the first digit.
        np.testing.assert_allclose(parts[path], whole[path], atol=1e-5 * whole[path].max())


def test_a_softmax_at_the_end_is_taken_into_account() -> None:
    linear, probabilities = mlp(), mlp(head="softmax")
    probabilities.set_weights(linear.get_weights())

    a, b = (SNIP(0.5, DATA).scores(model) for model in (linear, probabilities))

    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=1e-5 * a[path].max())  # float32


def test_embeddings_and_recurrence_have_scores() -> None:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(20, 4, name="words"),
            layers.LSTM(5, name="lstm"),
            layers.Dense(3, name="head"),
        ]
    )
    random = np.random.default_rng(0)
    x = random.integers(0, 10, (16, 6))  # the upper half of the words does not occur
    scores = SNIP(0.5, (x, random.integers(0, 3, 16))).scores(model)

    assert list(scores) == [
        "words/embeddings",
        "lstm/lstm_cell/kernel",
        "lstm/lstm_cell/recurrent_kernel",
        "head/kernel",
    ]
    assert scores["words/embeddings"][:10].min() > 0
    assert not scores["words/embeddings"][10:].any()


def test_a_given_loss_is_used() -> None:
    model = mlp(classes=1)
    x, y = DATA
    squared = SNIP(0.5, (x, y[:, None].astype("float32")), loss="mean_squared_error")

    assert squared.masks(model).kept == round(squared.masks(model).count / 2)
    with pytest.raises(ArgumentError, match="Give the loss"):
        SNIP(0.5, (x, y[:, None])).scores(model)


def test_what_cannot_be_scored_is_refused() -> None:
    model = mlp()
    with pytest.raises(DataError, match="Labels are needed"):
        SNIP(0.5, DATA[0]).scores(model)
    with pytest.raises(DataError, match="shape"):
        SNIP(0.5, (DATA[0][:, :3], DATA[1])).scores(model)
    for variable in model.trainable_variables:
        variable.assign(variable * 0)
    with pytest.raises(ModelError, match="sum to 0"):
        SNIP(0.5, DATA).scores(model)
    with pytest.raises(ArgumentError):
        SNIP(1.0, DATA)
    with pytest.raises(ArgumentError):
        SNIP(0.5, DATA, batches=0)
