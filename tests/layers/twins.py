"""The same model in Keras 3 and in tf_keras, trained on the same batches."""

from __future__ import annotations

import keras
import numpy as np
import tf_keras

from tfprune.schedules.tfmot import load

tfmot = load().sparsity.keras


def convolutional(framework):
    """Convolution, separable convolution, batch normalisation and dense layers."""
    layers = framework.layers
    return framework.Sequential(
        [
            framework.Input((6, 6, 3)) if framework is keras else layers.InputLayer((6, 6, 3)),
            layers.Conv2D(5, 3, padding="same", name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(name="relu"),
            layers.SeparableConv2D(4, 3, name="separable"),
            layers.Flatten(name="flat"),
            layers.Dense(7, activation="tanh", name="hidden"),
            layers.Dense(3, name="head"),
        ]
    )


def dense(framework):
    """Dense layers only, whose kernels can have blocks."""
    layers = framework.layers
    return framework.Sequential(
        [
            framework.Input((10,)) if framework is keras else layers.InputLayer((10,)),
            layers.Dense(9, activation="tanh", name="hidden"),
            layers.Dense(6, name="head"),
        ]
    )


def pair(build, seed=0):
    """A Keras 3 and a tf_keras model with equal weights, drawn at random."""
    models = build(keras), build(tf_keras)
    random = np.random.default_rng(seed)
    weights = [
        # variances of batch normalisation must be positive
        np.abs(value) if "variance" in variable.name else value
        for variable in models[0].weights
        for value in [random.standard_normal(variable.shape).astype("float32") / 2]
    ]
    for model in models:
        model.set_weights(weights)
    return models


def batches(model, count, size=8, seed=1):
    """Batches of standard-normal inputs and targets."""
    random = np.random.default_rng(seed)
    shapes = model.input_shape[1:], model.output_shape[1:]
    return [
        tuple(random.standard_normal((size, *shape)).astype("float32") for shape in shapes)
        for _ in range(count)
    ]


def compiled(model, framework):
    """Compiled with SGD with momentum, which revives masked weights."""
    model.compile(framework.optimizers.SGD(0.05, momentum=0.9), "mse")
    return model


def wrappers(model):
    """The wrappers of a tf_keras model that have something to prune, or those of a Keras 3 one."""
    return [layer for layer in model.layers if getattr(layer, "pruning_vars", None)]


def state(model):
    """Step, masks, thresholds and weights of every wrapper that has any."""
    return [
        (
            int(np.asarray(layer.pruning_step)),
            [np.asarray(mask) for _, mask, _ in layer.pruning_vars],
            [float(np.asarray(threshold)) for _, _, threshold in layer.pruning_vars],
            [np.asarray(weight) for weight, _, _ in layer.pruning_vars],
        )
        for layer in wrappers(model)
    ]
