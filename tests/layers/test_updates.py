"""What a method changes of a training step, around any optimizer."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import tfprune
from tests.methods.models import mlp, rows
from tfprune.errors import ArgumentError
from tfprune.graph import analyse
from tfprune.layers.method_model import MethodModel
from tfprune.layers.per_channel import Axis
from tfprune.layers.updates import MethodOptimizer, MethodUpdate

X, Y = rows(32)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@keras.saving.register_keras_serializable(package="tests")
class Descend(MethodUpdate):
    """Biases go down by a fixed step; kernels get twice their gradient; steps are counted."""

    def __init__(self, step=0.5, **kwargs):
        super().__init__(**kwargs)
        self.step = step

    def get_config(self):
        return {"step": self.step}

    def bind(self, graph):
        weights = [site.variable for site in graph.record.sites.values()]
        self.hold(
            biases=[v for v in weights if v.name == "bias"],
            kernels=[v for v in weights if v.name == "kernel"],
        )
        self.count = self.state("count", dtype="int64")
        self.seen = self.state("seen", np.ones(3, np.float32))

    @property
    def owned(self):
        return self.held.biases

    def gradients(self, gradients, learning_rate):
        return {**gradients, **{id(v): 2 * gradients[id(v)] for v in self.held.kernels}}

    def update(self, gradients, learning_rate):
        self.count.assign_add(1)
        for bias in self.held.biases:
            bias.assign(bias - self.step * learning_rate)


def compiled(optimizer, **options):
    model = MethodModel.of(mlp(), Descend())
    model.compile(optimizer, LOSS, **options)
    return model


def fit(model, epochs=1, **options):
    model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **options)
    return model


def test_a_model_that_trains_by_an_update() -> None:
    source = mlp()
    twice = keras.models.clone_model(source)
    twice.set_weights(source.get_weights())
    for layer in twice.layers:
        layer.bias.trainable = False
    model = compiled(keras.optimizers.SGD(0.1))
    assert isinstance(model.optimizer, MethodOptimizer)
    fit(model)
    assert int(np.asarray(model.update.count)) == 4 == int(np.asarray(model.optimizer.iterations))
    # what it owns the optimizer has not touched: 4 steps of 0.5 times the rate
    for layer in model.layers[1:]:
        np.testing.assert_allclose(np.asarray(layer.bias), -0.2, rtol=1e-6)
    # the others moved by twice the rate: the same steps by hand, with the biases as they went
    twice.compile(keras.optimizers.SGD(0.2), LOSS)
    for start in range(0, 32, 8):
        twice.fit(X[start : start + 8], Y[start : start + 8], batch_size=8, verbose=0)
        for layer in twice.layers:
            layer.bias.assign(layer.bias - 0.05)
    for a, b in zip(model.layers[1:], twice.layers, strict=True):
        # float32, the same sums
        np.testing.assert_allclose(np.asarray(a.kernel), np.asarray(b.kernel), atol=1e-6)


def test_it_has_the_state_and_nothing_else() -> None:
    model = compiled("sgd")
    assert [weight.name for weight in model.update.weights] == ["count", "seen"]
    assert len(model.trainable_weights) == 8
    assert {w.name for w in model.non_trainable_weights} == {"count", "seen"}
    again = tfprune.methods.plain_copy(model)  # and leaves no trace
    assert type(again) is keras.Model or type(again).__name__ == "Functional"
    assert len(again.weights) == 8


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_saved_with_its_optimizer(optimizer, policy, tmp_path) -> None:
    keras.config.set_dtype_policy(policy)
    try:
        model = compiled(optimizer)
        fit(model)
        model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    finally:
        keras.config.set_dtype_policy("float32")
    fit(model), fit(loaded)
    for a, b in zip(model.variables, loaded.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=a.path)
    assert int(np.asarray(loaded.update.count)) == 8


def test_weight_decay_leaves_owned_weights_alone() -> None:
    found = []
    for decay in (0.0, 0.5):
        model = MethodModel.of(mlp(), Descend())
        tfprune.fine_tune(
            model, (X, Y), epochs=1, batch_size=8, learning_rate=0.1, weight_decay=decay, verbose=0
        )
        found.append([np.asarray(layer.bias) for layer in model.layers[1:]])
        kernels = [np.abs(np.asarray(layer.kernel)).sum() for layer in model.layers[1:]]
        found[-1].append(sum(kernels))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert found[1][-1] < found[0][-1]


def test_compiled_again_it_is_around_once() -> None:
    model = compiled("adam")
    fit(model)
    model.compile(model.optimizer, LOSS)
    assert isinstance(model.optimizer, MethodOptimizer)
    assert not isinstance(model.optimizer.inner, MethodOptimizer)
    model.optimizer.learning_rate = 0.25
    assert float(np.asarray(model.optimizer.inner.learning_rate)) == 0.25
    model.compile("sgd", LOSS)
    fit(model)
    assert int(np.asarray(model.update.count)) == 8


def test_gradient_accumulation_is_refused() -> None:
    with pytest.raises(ArgumentError, match="gradient_accumulation_steps=4"):
        compiled(keras.optimizers.SGD(0.1, gradient_accumulation_steps=4))


def test_between_weights_and_channels() -> None:
    """Sums over what belongs to a channel, and numbers spread over it, behind a flatten too."""
    layers = keras.layers
    keras.utils.set_random_seed(0)
    inputs = keras.Input((2, 2, 3))
    made = layers.Conv2D(4, 1, name="a")(inputs)
    other = layers.Conv2D(2, 1, name="b")(inputs)
    joined = layers.Flatten()(layers.Concatenate()([made, other]))
    model = keras.Model(inputs, layers.Dense(5, name="head")(joined))
    group = analyse(model)["a"]
    (reader,) = [m for m in group.members if m.masked]
    axis = Axis(reader, 4)
    kernel = np.asarray(model.get_layer("head").kernel)
    rows_of = [[6 * position + channel for position in range(4)] for channel in range(4)]
    np.testing.assert_allclose(
        np.asarray(axis.total(kernel)),
        [kernel[positions].sum() for positions in rows_of],
        atol=1e-5,  # float32 sums of 20 numbers in another order
    )
    spread = np.asarray(axis.spread(np.arange(1.0, 5.0, dtype="float32"), elsewhere=9.0))
    assert spread.shape == (24, 1)
    expected = np.full(24, 9.0)
    for channel, positions in enumerate(rows_of):
        expected[positions] = channel + 1
    np.testing.assert_array_equal(spread[:, 0], expected)
    assert axis.size == 20
    whole = Axis(group.producers[0], 4)
    assert whole.size == 3
    np.testing.assert_array_equal(np.asarray(whole.spread(np.ones(4, "float32"))), [[[[1] * 4]]])
