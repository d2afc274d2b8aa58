"""Masked ≡ pruned on tf_keras (Keras 2) models, which stay tf_keras models."""

import pytest
import tf_keras

import tfprune
from tfprune.testing import check_surgery, randomize


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # Operators as layers, gates behind reshapes, nested blocks, grouped convolutions.
    ["MobileNetV3Small", "EfficientNetB0", "ConvNeXtTiny", "RegNetX002"],
)
def test_applications(name):
    build = getattr(tf_keras.applications, name)
    model = randomize(build(weights=None, input_shape=(64, 64, 3), classifier_activation=None))
    # Statistics are arbitrary here, so that activations grow and shrink by orders of magnitude
    # over the depth; rounding grows with them.
    plan = check_surgery(model, tolerance=1e-4)
    assert set(plan.kept) == {group.name for group in tfprune.analyse(model).prunable}
    assert isinstance(plan.apply(model), tf_keras.Model)
    tf_keras.backend.clear_session()


def test_sequential_and_compiled():
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [layers.Conv2D(16, 3, input_shape=(8, 8, 3)), layers.ReLU(), layers.Flatten(),
         layers.Dense(4)], name="line",
    )  # fmt: skip
    model.compile("sgd", "mse")
    small = tfprune.prune(randomize(model), 0.5)
    assert isinstance(small, tf_keras.Sequential)
    assert small.layers[0].filters == 8
    assert small.optimizer is not None
    check_surgery(model, tolerance=1e-5)  # three float32 layers: some hundred roundings
