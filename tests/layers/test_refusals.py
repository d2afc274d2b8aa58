"""What cannot be done is refused, with what was expected, what came, and what to do."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfprune
from tests.layers.networks import normal, small
from tfprune.errors import ArgumentError, ModelError
from tfprune.layers import PruneLowMagnitude, masks_of, set_masks, with_masks

layers = keras.layers
X, Y = normal(8, 8), normal(8, 4)


class _Subclassed(keras.Model):
    pass


def _image_model():
    return keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3, name="conv")])


def _series_model():
    return keras.Sequential([keras.Input((8, 3)), layers.Conv1D(4, 3, name="conv")])


THINGS = {
    "subclassed": (_Subclassed, r"functional or sequential.*subclassed model '_Subclassed'"),
    "number": (lambda: 3, r"model, a layer, or a list of layers. Received: int"),
    "in a list": (lambda: [3], r"Keras 3 layer. Received: int"),
    "wrapper": (
        lambda: tfprune.prune_low_magnitude(layers.Dense(3, name="one")),
        "without pruning wrapper. Received: 'prune_low_magnitude_one'",
    ),
    "empty": (keras.Sequential, "of which no layer has any"),
    "nothing to prune": (
        lambda: keras.Sequential([keras.Input((3,)), layers.ReLU()], name="bare"),
        "weights to prune. Received: 'bare', of which no layer has any",
    ),
}


@pytest.mark.parametrize("name", THINGS)
def test_things_that_cannot_be_wrapped(name) -> None:
    make, message = THINGS[name]
    with pytest.raises(ModelError, match=message):
        tfprune.prune_low_magnitude(make())


OPTIONS = [
    ({"pruning_schedule": 0.5}, "to be a PruningSchedule.*Received: float"),
    ({"pruning_schedule": None}, "Received: NoneType"),
    ({"block_size": 4}, "two whole numbers from 1.*Received: 4"),
    ({"block_size": (4,)}, r"Received: \(4,\)"),
    ({"block_size": (0, 1)}, r"Received: \(0, 1\)"),
    ({"block_size": (1.0, 1)}, r"Received: \(1.0, 1\)"),
    ({"block_size": (True, 1)}, r"Received: \(True, 1\)"),
    ({"block_size": "ab"}, "Received: 'ab'"),
    ({"block_pooling_type": "MIN"}, "'AVG' or 'MAX'. Received: 'MIN'"),
    ({"sparsity_m_by_n": 2}, r"such as \(2, 4\). Received: 2"),
    ({"sparsity_m_by_n": (4, 2)}, r"Received: \(4, 2\)"),
    ({"sparsity_m_by_n": (2, 2)}, r"Received: \(2, 2\)"),
    ({"sparsity_m_by_n": (0, 4)}, r"Received: \(0, 4\)"),
]


@pytest.mark.parametrize(("options", "message"), OPTIONS)
def test_options_that_make_no_sense(options, message) -> None:
    for target in (small(), layers.Dense(3), [layers.Dense(3)]):
        with pytest.raises(ArgumentError, match=message):
            tfprune.prune_low_magnitude(target, **options)


PATTERNS = [
    (_image_model, {"block_size": (2, 2)}, r"2 axes .*'conv/kernel' of shape \(3, 3, 3, 4\)"),
    (_series_model, {"block_size": (2, 2)}, r"2 axes .*'conv/kernel' of shape \(3, 3, 4\)"),
    (
        lambda: keras.Sequential([keras.Input((16,)), layers.Dense(4, name="thin")]),
        {"block_size": (2, 4)},  # tfmot would fail with "Input tensor must be rank 2" in training
        r"2 blocks or more .*'thin/kernel' of shape \(16, 4\), with 8 x 1 blocks",
    ),
    (_series_model, {"sparsity_m_by_n": (2, 4)}, r"2 or 4 axes .*'conv/kernel' of shape"),
]


@pytest.mark.parametrize(("build", "options", "message"), PATTERNS)
def test_patterns_that_do_not_fit_a_kernel(build, options, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        tfprune.prune_low_magnitude(build(), **options)
    # one that is not built yet says so when it is
    plain = build()
    fresh = type(plain.layers[0]).from_config(plain.layers[0].get_config())
    wrapper = tfprune.prune_low_magnitude(fresh, **options)
    with pytest.raises(ArgumentError, match=message):
        wrapper.build(plain.input_shape)


def test_a_layer_of_keras2_in_the_wrapper() -> None:
    import tf_keras

    with pytest.raises(ModelError, match=r"Received: Dense. It is a layer of tf_keras"):
        PruneLowMagnitude(tf_keras.layers.Dense(3))


def test_another_backend(monkeypatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(
        ModelError, match=r"Keras on TensorFlow.*Received: backend 'jax'.*Set KERAS"
    ):
        tfprune.prune_low_magnitude(layers.Dense(3))


def test_a_policy_that_allows_nothing() -> None:
    class Nothing(tfprune.PruningPolicy):
        def allow_pruning(self, layer):
            return False

        def ensure_model_supports_pruning(self, model):
            pass

    with pytest.raises(ModelError, match="'small', of which the policy allows no layer"):
        tfprune.prune_low_magnitude(small(), pruning_policy=Nothing())


@pytest.mark.parametrize("options", [{}, {"jit_compile": True}, {"run_eagerly": True}])
def test_a_forgotten_callback_in_fit(options) -> None:
    model = tfprune.prune_low_magnitude(small())
    model.compile("sgd", "mse", **options)
    with pytest.raises(ArgumentError, match=r"Expected the callback tfprune.UpdatePruningStep\(\)"):
        model.fit(X, Y, verbose=0)
    # and with it, the same model trains
    model.fit(X, Y, verbose=0, callbacks=[tfprune.UpdatePruningStep()])


@pytest.mark.parametrize("compiled", [None, False, True])
def test_a_forgotten_callback_in_a_loop(compiled) -> None:
    model = tfprune.prune_low_magnitude(small())

    def step(x):
        return model(x, training=True)

    run = step if compiled is None else tf.function(step, jit_compile=compiled, autograph=False)
    with pytest.raises(ArgumentError, match=r"'prune_low_magnitude_hidden' without it.*set_model"):
        run(tf.constant(X))


def test_a_callback_without_a_model() -> None:
    with pytest.raises(ArgumentError, match=r"Call set_model\(model\)"):
        tfprune.UpdatePruningStep().on_train_begin()


def test_strip_pruning_of_other_things() -> None:
    with pytest.raises(ModelError, match=r"Expected a Keras model.*Received: Dense"):
        tfprune.strip_pruning(layers.Dense(3))
    with pytest.raises(ModelError, match="subclassed model '_Subclassed'"):
        tfprune.strip_pruning(_Subclassed())


def test_wrappers_inside_other_layers_cannot_be_taken_off() -> None:
    inside = layers.TimeDistributed(tfprune.prune_low_magnitude(layers.Dense(4, name="deep")))
    model = keras.Sequential([keras.Input((3, 4)), inside], name="hiding")
    with pytest.raises(ModelError, match=r"'hiding'.*\['deep'\].*Wrap the outer layers"):
        tfprune.strip_pruning(model)


def test_masks_that_do_not_fit() -> None:
    model = small()
    wrapped = tfprune.prune_low_magnitude(model)
    wrong = {"hidden/kernel": np.ones((8, 15))}
    for give in (with_masks, set_masks):
        target = model if give is with_masks else wrapped
        with pytest.raises(ArgumentError, match=r"shape \(8, 16\).*of shape \(8, 15\)"):
            give(target, tfprune.layers.Masks(wrong))
        with pytest.raises(ArgumentError, match="'elsewhere/kernel' besides"):
            give(target, tfprune.layers.Masks({"elsewhere/kernel": np.ones(3)}))
    assert masks_of(wrapped).sparsity == 0


def test_masks_of_what_has_none() -> None:
    for read in (masks_of, lambda model: set_masks(model, tfprune.layers.Masks({}))):
        with pytest.raises(ModelError, match="Expected a built model"):
            read(tfprune.prune_low_magnitude(keras.Sequential([layers.Dense(2)])))
        with pytest.raises(ModelError, match=r"Expected a Keras 3 model. Received: Dense"):
            read(layers.Dense(2))


def test_the_callback_without_wrappers_warns() -> None:
    callback = tfprune.UpdatePruningStep()
    callback.set_model(keras.Sequential([keras.Input((3,)), layers.Dense(2)], name="plain"))
    with pytest.warns(UserWarning, match="'plain' has no pruning wrappers"):
        callback.on_train_begin()
