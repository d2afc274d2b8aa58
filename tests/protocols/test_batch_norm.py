"""Batch-normalisation statistics against ones computed in numpy."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from tfprune.errors import DataError, ModelError
from tfprune.protocols import recalibrate_batch_norm

from .models import classifier

RNG = np.random.default_rng(0)
EPSILON = 1e-3


def two_layers(framework):
    """Dense, batch norm, ReLU, dense, batch norm: small enough to redo in numpy."""
    x = image = framework.Input((5,))
    x = framework.layers.Dense(4, use_bias=False, name="dense1")(x)
    x = framework.layers.BatchNormalization(epsilon=EPSILON, name="norm1")(x)
    x = framework.layers.ReLU()(x)
    x = framework.layers.Dense(3, name="dense2")(x)
    x = framework.layers.BatchNormalization(epsilon=EPSILON, name="norm2")(x)
    model = framework.Model(image, x)
    model.set_weights(
        [RNG.uniform(0.5, 1.5, w.shape).astype(np.float32) for w in model.get_weights()]
    )
    return model


def expected(model, batches):
    """The documented estimate, written out: batch by batch, then pooled."""
    weight = {w: model.get_layer(w).get_weights() for w in ("dense1", "norm1", "dense2")}
    seen = {"norm1": [], "norm2": []}
    for x in batches:
        a = x.astype(np.float64) @ weight["dense1"][0]
        seen["norm1"].append(a)
        gamma, beta = weight["norm1"][:2]
        a = (a - a.mean(axis=0)) / np.sqrt(a.var(axis=0) + EPSILON) * gamma + beta
        kernel, bias = weight["dense2"]
        seen["norm2"].append(np.maximum(a, 0) @ kernel + bias)
    # Pooling means and variances is the mean and variance of all inputs put together.
    together = {name: np.concatenate(inputs) for name, inputs in seen.items()}
    return {name: (a.mean(axis=0), a.var(axis=0)) for name, a in together.items()}


@pytest.mark.parametrize("framework", [keras, tf_keras], ids=["keras", "tf_keras"])
@pytest.mark.parametrize("sizes", [[40], [20, 20], [32, 8], [1, 39]])
def test_the_statistics_are_the_documented_ones(framework, sizes) -> None:
    model = two_layers(framework)
    x = RNG.normal(1, 2, (40, 5)).astype(np.float32)
    batches = np.split(x, np.cumsum(sizes)[:-1])
    data = tf.data.Dataset.from_generator(
        lambda: iter(batches), output_signature=tf.TensorSpec((None, 5), tf.float32)
    )
    wanted = expected(model, batches)
    assert recalibrate_batch_norm(model, data) == 2
    for name, (mean, variance) in wanted.items():
        layer = model.get_layer(name)
        # The layers compute in float32 (relative 6e-8 an operation, some ten of them on numbers
        # of about 10), the pooling is in float64. A batch of one example has variance 0, where
        # normalisation divides rounding errors by sqrt(epsilon) = 0.03.
        np.testing.assert_allclose(layer.moving_mean.numpy(), mean, rtol=1e-5, atol=3e-5)
        np.testing.assert_allclose(layer.moving_variance.numpy(), variance, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("framework", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_nothing_else_changes(framework) -> None:
    model = classifier(framework, dropout=0.5)
    model.layers[2].trainable = False
    model.compile("adam", "mse")
    before = model.get_weights()
    flags = [layer.trainable for layer in model.layers]
    attributes = [sorted(vars(layer)) for layer in model.layers]
    optimizer = model.optimizer
    x = RNG.normal(size=(30, 6, 6, 2)).astype(np.float32)
    assert recalibrate_batch_norm(model, x, batch_size=10) == 1
    after = model.get_weights()
    norm = model.layers[2]
    moving = [
        i
        for i, weight in enumerate(model.weights)
        if weight is norm.moving_mean or weight is norm.moving_variance
    ]
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        assert np.array_equal(old, new) != (i in moving)
    assert [layer.trainable for layer in model.layers] == flags
    assert [sorted(vars(layer)) for layer in model.layers] == attributes
    assert model.optimizer is optimizer
    # The layer's own behaviour is back: inference is a pure function again.
    first = model.predict(x, verbose=0)
    assert np.array_equal(first, model.predict(x, verbose=0))
    assert all(np.array_equal(a, b) for a, b in zip(after, model.get_weights(), strict=True))


def test_one_batch_makes_inference_equal_to_training() -> None:
    model = classifier(keras)
    x = RNG.normal(3, 2, size=(50, 6, 6, 2)).astype(np.float32)
    recalibrate_batch_norm(model, x, batch_size=50)
    inference, training = model(x, training=False), model(x, training=True)
    # Same mean and variance, up to float32 sums in another order.
    np.testing.assert_allclose(inference, training, rtol=1e-4, atol=1e-5)


def test_dropout_is_off() -> None:
    plain, dropping = (classifier(keras, dropout=rate) for rate in (0.0, 0.9))

    def deepened(model):
        x = keras.layers.BatchNormalization(name="last")(model.output)
        return keras.Model(model.input, x)

    plain, dropping = deepened(plain), deepened(dropping)
    x = RNG.normal(size=(40, 6, 6, 2)).astype(np.float32)
    for model in (plain, dropping):
        recalibrate_batch_norm(model, x)
    assert np.array_equal(
        plain.get_layer("last").moving_variance.numpy(),
        dropping.get_layer("last").moving_variance.numpy(),
    )


def test_nested_models_and_shared_layers() -> None:
    inner = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="inner")])
    outer = keras.layers.BatchNormalization(name="outer")
    a, b = keras.Input((3,)), keras.Input((3,))
    model = keras.Model([a, b], outer(inner(keras.layers.Concatenate(axis=-1)([a, b])[:, :3])))
    shared = keras.layers.BatchNormalization()
    twice = keras.Model([a, b], keras.layers.Add()([shared(a), shared(b)]))
    x, y = (RNG.normal(size=(20, 3)).astype(np.float32) * k for k in (1, 3))
    assert recalibrate_batch_norm(model, [x, y]) == 2
    # A float64 sum of float32 numbers, rounded once to float32.
    np.testing.assert_allclose(
        inner.get_layer("inner").moving_mean.numpy(), x.astype(np.float64).mean(axis=0), rtol=1e-6
    )
    assert recalibrate_batch_norm(twice, [x, y]) == 1
    both = np.concatenate([x, y]).astype(np.float64)
    np.testing.assert_allclose(shared.moving_variance.numpy(), both.var(axis=0), rtol=1e-6)


def test_channels_in_front() -> None:
    image = keras.Input((3, 4))
    norm = keras.layers.BatchNormalization(axis=1)
    model = keras.Model(image, norm(image))
    x = RNG.normal(size=(10, 3, 4)).astype(np.float32)
    recalibrate_batch_norm(model, x)
    np.testing.assert_allclose(
        norm.moving_mean.numpy(), x.mean(axis=(0, 2), dtype=np.float64), rtol=1e-6
    )


def test_a_mask_leaves_steps_out() -> None:
    words = keras.Input((4,), dtype="int32")
    embedded = keras.layers.Embedding(5, 3, mask_zero=True)(words)
    norm = keras.layers.BatchNormalization()
    model = keras.Model(words, norm(embedded))
    x = np.array([[1, 2, 0, 0], [3, 4, 1, 0]], np.int32)
    recalibrate_batch_norm(model, x)
    table = model.layers[1].get_weights()[0].astype(np.float64)
    np.testing.assert_allclose(norm.moving_mean.numpy(), table[x[x > 0]].mean(axis=0), rtol=1e-6)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy: str) -> None:
    keras.config.set_dtype_policy(policy)
    try:
        model = classifier(keras)
    finally:
        keras.config.set_dtype_policy("float32")
    full = classifier(keras)
    full.set_weights(model.get_weights())
    x = RNG.normal(size=(30, 6, 6, 2)).astype(np.float32)
    for either in (model, full):
        assert recalibrate_batch_norm(either, x) == 1
    norm, reference = model.layers[2], full.layers[2]
    assert norm.moving_mean.dtype == "float32"
    # bfloat16 keeps 8 bits: each of the convolution's inputs is off by 0.4 %, their sums by less.
    np.testing.assert_allclose(norm.moving_mean.numpy(), reference.moving_mean.numpy(), atol=0.01)
    np.testing.assert_allclose(
        norm.moving_variance.numpy(), reference.moving_variance.numpy(), rtol=0.02
    )


def test_a_limit_on_batches() -> None:
    model, x = classifier(keras), RNG.normal(size=(30, 6, 6, 2)).astype(np.float32)
    recalibrate_batch_norm(model, x, batches=2, batch_size=10)
    limited = model.layers[2].moving_mean.numpy()
    recalibrate_batch_norm(model, (x[:20], np.zeros(20)), batch_size=10)
    assert np.array_equal(limited, model.layers[2].moving_mean.numpy())


def test_a_model_without_batch_normalisation_counts_zero() -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    assert recalibrate_batch_norm(model, "never read") == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((0, 6, 6, 2), np.float32), "empty"),
        (np.zeros((4, 5, 5, 2), np.float32), r"\(None, 6, 6, 2\); received \(4, 5, 5, 2\)"),
        (np.full((4, 6, 6, 2), np.nan, np.float32), "NaN or infinity"),
    ],
)
def test_after_an_error_all_is_as_before(data, message: str) -> None:
    model = classifier(keras)
    before = model.get_weights()
    with pytest.raises(DataError, match=message):
        recalibrate_batch_norm(model, data)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert "call" not in vars(model.layers[2])


def test_an_interruption_leaves_the_old_statistics() -> None:
    model = classifier(keras)
    before = model.get_weights()

    class Interrupted:
        element_spec = tf.TensorSpec((None, 6, 6, 2), tf.float32)

        def cardinality(self):
            return 2

        def as_numpy_iterator(self):
            yield np.ones((2, 6, 6, 2), np.float32)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recalibrate_batch_norm(model, Interrupted())
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.parametrize("model", ["resnet", keras.Sequential([keras.layers.Dense(2)])])
def test_what_is_no_built_model_is_refused(model) -> None:
    with pytest.raises(ModelError, match=r"Expected a Keras|no weights yet"):
        recalibrate_batch_norm(model, np.zeros((1, 2)))
