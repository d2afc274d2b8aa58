"""Masked ≡ pruned on every model of keras.applications, at three ratios.

The masked model is the original with the consumers' slices of removed channels set to zero, see
tfprune.surgery.verify. Weights and statistics are random, outputs are logits.
"""

import gc
import inspect

import keras
import numpy as np
import pytest

import tfprune
from tfprune.cost import CostModel

# Float32 sums in another order differ by some 1e-7 of the largest term; over the depth of these
# networks the differences stay below 1e-5 of the largest logit.
TOLERANCE = 1e-5

MODELS = sorted(
    name
    for name, value in vars(keras.applications).items()
    if inspect.isfunction(value) and name[0].isupper()
)
# More than 60 million parameters, or more than 600 layers: tens of seconds each.
SLOW = {
    name
    for name in MODELS
    if name
    in (
        "ConvNeXtLarge", "ConvNeXtXLarge", "ConvNeXtBase", "DenseNet201", "DenseNet169",
        "EfficientNetB4", "EfficientNetB5", "EfficientNetB6", "EfficientNetB7",
        "EfficientNetV2L", "EfficientNetV2M", "EfficientNetV2S", "InceptionResNetV2",
        "NASNetLarge", "NASNetMobile", "ResNet152", "ResNet152V2", "VGG16", "VGG19",
    )
}  # fmt: skip


def build(name, size=96):
    """A model with random weights and statistics, and logits as outputs.

    Statistics are those of random images, each off by a random factor: with arbitrary ones
    activations grow to 1e8 in the deep networks, gates saturate, and rounding is all that is left.
    """
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classifier_activation=None
    )
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if len(variable.shape) == 1 and "moving" not in variable.path:
            # Biases and offsets start at zero, scales at one or (LayerScale) nearly zero.
            scale = variable.path.endswith("gamma")
            low, high = (0.5, 1.5) if scale else (-0.3, 0.3)
            variable.assign(rng.uniform(low, high, variable.shape))
    norms = [
        layer
        for layer in model._flatten_layers(include_self=False, recursive=True)
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    if norms:
        model(images_for(model, name, 4), training=True)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
        for variable in (layer.moving_mean, layer.moving_variance):
            variable.assign(variable * rng.uniform(0.8, 1.25, variable.shape))
    return model


def images_for(model, name, count):
    """Random images in the range that the model expects; some rescale inside."""
    images = np.random.default_rng(1).uniform(-1, 1, (count, *model.input_shape[1:]))
    if name.startswith(("EfficientNet", "ConvNeXt", "MobileNetV3")):
        images = 127.5 * (images + 1)
    return images.astype("float32")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS]
)
def test_masked_equals_pruned(name):
    model = build(name)
    graph = tfprune.analyse(model)
    assert CostModel(graph).frozen_share_of_macs() < 0.05
    images = images_for(model, name, 1)
    for ratio in (0.25, 0.5, 0.75):
        plan = tfprune.plan(graph, ratio, criterion="random", round_to=1)
        assert set(plan.kept) == {group.name for group in graph.prunable}
        found = tfprune.verify(model, plan, inputs=images, tolerance=TOLERANCE)
        assert found, f"{name} at {ratio}: {found}"
        assert found.magnitude > 0
    keras.backend.clear_session()
    del model, graph
    gc.collect()


def test_every_model_is_covered():
    # 40 in Keras 3.15; a new one is picked up by itself, a lost one is noticed.
    assert len(MODELS) >= 38
