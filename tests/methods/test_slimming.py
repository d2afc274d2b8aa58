"""Network Slimming."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import tfprune
from tests.methods.models import residual, same, snapshot, stir, stripes
from tfprune.errors import ArgumentError, BudgetError, ModelError
from tfprune.graph.masking import predict_on
from tfprune.methods import NetworkSlimming
from tfprune.methods.slimming import scales_of


def scales(model):
    """Path of a batch normalisation -> its scales."""
    return {
        layer.name: np.asarray(layer.gamma).copy()
        for layer in model.layers
        if isinstance(layer, keras.layers.BatchNormalization)
    }


def test_the_sub_gradient_goes_through_the_optimizer() -> None:
    """Sheet A4: lambda sign(gamma), sign(0) = 0, is added before momentum.

    A network whose loss does not depend on the scales leaves the penalty alone: momentum mu and
    rate r give v <- mu v - r lambda sign(gamma), gamma <- gamma + v.
    """
    penalty, rate, momentum = 0.1, 0.01, 0.9
    model = NetworkSlimming(penalty).prepare(residual())
    model.get_layer("head").kernel.assign(np.zeros((10, 3)))
    model.get_layer("head").trainable = False
    start = np.array([0.5, -0.5, 0.0, 1.0, 2.0, -1.0])
    model.get_layer("first_bn").gamma.assign(start)
    model.compile(
        keras.optimizers.SGD(rate, momentum=momentum),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(*stripes(24), batch_size=8, epochs=1, verbose=0)
    expected, velocity = start.copy(), np.zeros(6)
    for _ in range(3):
        velocity = momentum * velocity - rate * penalty * np.sign(expected)
        expected = expected + velocity
    # float32 over three steps
    np.testing.assert_allclose(scales(model)["first_bn"], expected, atol=1e-6)


def test_one_threshold_for_all_channels() -> None:
    """The ``floor(N p)`` channels of smallest scale go, wherever they are (the Lua rule)."""
    model = residual()
    model.get_layer("first_bn").gamma.assign([0.9, 0.1, 0.8, 0.2, 0.7, 0.3])
    model.get_layer("last_bn").gamma.assign(np.linspace(0.05, 0.95, 10))
    method = NetworkSlimming(pruning_ratio=0.3, ignore=["stem"])
    plan = method.plan(method.prepare(model))
    # N = 16 without the stream, floor(4.8) = 4: 0.05, 0.1, 0.15 and 0.2
    assert plan.kept == {"first": (0, 2, 4, 5), "last": tuple(range(2, 10))}


def test_a_coupled_channel_is_worth_its_largest_scale() -> None:
    model = residual()
    model.get_layer("stem_bn").gamma.assign([0.1, 0.1, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5])
    model.get_layer("second_bn").gamma.assign([0.1, 0.9, 0.1, 0.9, 0.5, 0.5, 0.5, 0.5])
    method = NetworkSlimming()
    values = method.scores(tfprune.analyse(method.prepare(model)))["stem"]
    np.testing.assert_allclose(values[:4], [0.1, 0.9, 0.9, 0.9], rtol=1e-6)


def test_the_smaller_network_is_the_one_with_zero_scales_and_shifts() -> None:
    """Sheet A10.6: removal equals gamma = beta = 0, where the activation of 0 is 0."""
    method = NetworkSlimming(macs=0.5, ignore=["stem"])
    model = method.prepare(stir(residual()))
    plan = method.plan(model)
    zeroed = tfprune.methods.plain_copy(model)
    for name, kept in plan.kept.items():
        for part in ("gamma", "beta"):
            variable = getattr(zeroed.get_layer(f"{name}_bn"), part)
            value = np.asarray(variable).copy()
            value[np.setdiff1d(np.arange(len(value)), kept)] = 0
            variable.assign(value)
    x, _ = stripes(8)
    smaller = method.finish(model)
    # the same products; float32 sums without the zeros
    np.testing.assert_allclose(
        predict_on(smaller, [x])[0], predict_on(zeroed, [x])[0], rtol=1e-5, atol=1e-6
    )


@pytest.fixture(scope="module")
def trained():
    """A run to half the MACs."""
    source = residual()
    before = snapshot(source)
    method = NetworkSlimming(0.02, initial_scale=0.5, macs=0.5)
    result = method.run(source, stripes(96), stripes(24, 1), epochs=4, learning_rate=0.1, verbose=0)
    assert same(before, source)
    return result


def test_a_run_ends_at_the_macs_asked_for(trained) -> None:
    assert 0.3 < trained.macs <= 0.5
    small = tfprune.analyse(trained.model)
    for name, kept in trained.plan.kept.items():
        assert small[name].width == len(kept)
    # masked equals pruned, by the oracle
    assert tfprune.verify(trained.trained, trained.plan).passed
    assert trained.difference > 0


def test_the_record_shows_how_the_structure_emerged(trained) -> None:
    history = trained.record.history
    assert len(history["macs"]) == 4 and max(history["macs"]) <= 0.5
    assert {"width/stem", "width/first", "width/last", "channels", "mean_scale"} <= set(history)
    # the penalty shrinks: 4 epochs of 2 steps (batches of 64) move scales from 0.5 downwards
    assert history["mean_scale"][-1] < history["mean_scale"][0] < 0.5
    widths = {name: len(kept) for name, kept in trained.plan.kept.items()}
    assert all(history[f"width/{name}"][-1] == width for name, width in widths.items())


def test_without_a_request_the_threshold_decides() -> None:
    method = NetworkSlimming()
    model = method.prepare(residual())
    model.get_layer("first_bn").gamma.assign([0.02, 0.01, -0.02, 0.0, -0.005, 1.0])
    assert method.plan(model).kept == {"first": (0, 2, 5)}
    model.get_layer("first_bn").gamma.assign(np.zeros(6))
    assert method.plan(model).kept == {"first": (0,)}  # one channel stays


def test_scales_that_are_not_there() -> None:
    model = residual()
    bare = keras.models.clone_model(
        model,
        clone_function=lambda layer: layer.__class__.from_config(
            {**layer.get_config(), "scale": False}
            if isinstance(layer, keras.layers.BatchNormalization)
            else layer.get_config()
        ),
    )
    with pytest.raises(ArgumentError, match="NetworkSlimming can act on"):
        NetworkSlimming().prepare(bare)
    groups = tfprune.analyse(model).prunable
    assert [len(scales_of(group)) for group in groups] == [2, 1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"penalty": 0}, "positive penalty"),
        ({"penalty": float("nan")}, "positive penalty"),
        ({"initial_scale": -1}, "initial_scale"),
        ({"macs": 0.5, "pruning_ratio": 0.5}, "both"),
        ({"pruning_ratio": 1}, "pruning_ratio"),
        ({"macs": -1}, "macs"),
        ({"min_channels": 0}, "min_channels"),
    ],
    ids=range(7),
)
def test_arguments(arguments, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        NetworkSlimming(**arguments)


def test_what_cannot_be_prepared() -> None:
    with pytest.raises(BudgetError, match="macs"):
        NetworkSlimming(macs=0.001).prepare(residual())
    with pytest.raises(ArgumentError, match="ignore"):
        NetworkSlimming(ignore=["nothing"]).prepare(residual())
    prepared = NetworkSlimming().prepare(residual())
    with pytest.raises(ModelError, match="trains by a method already"):
        NetworkSlimming().prepare(prepared)

    class Own(keras.Model):
        def train_step(self, data):
            return {}

    source = residual()
    with pytest.raises(ModelError, match="class Own"):
        NetworkSlimming().prepare(Own(source.inputs, source.outputs))
