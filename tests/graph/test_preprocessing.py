"""Layers that prepare data, within a model."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tf_keras

from tfprune.graph import analyse

from .oracle import assert_masked_equals_pruned, chain

FRAMEWORKS = [keras, tf_keras]
ops = keras.ops


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    ("scale", "offset"), [(0.5, 1.0), ([0.1 * i for i in range(1, 9)], -1.0), (2.0, [1.0] * 8)]
)
def test_rescaling_by_numbers_and_lists(framework: Any, scale: Any, offset: Any) -> None:
    layers = framework.layers
    model = chain(
        framework, (4, 4, 2), layers.Conv2D(8, 1, name="a"), layers.Rescaling(scale, offset),
        layers.Flatten(), layers.Dense(3),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"a"})


AUGMENTATIONS = [
    ("RandomFlip", {}), ("RandomRotation", {"factor": 0.2}), ("RandomZoom", {"height_factor": 0.2}),
    ("RandomTranslation", {"height_factor": 0.2, "width_factor": 0.2}),
    ("RandomContrast", {"factor": 0.5}), ("RandomBrightness", {"factor": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("name", "options"), AUGMENTATIONS)
def test_augmentation_is_off_at_inference(framework: Any, name: str, options: Any) -> None:
    layers = framework.layers
    model = chain(
        framework, (6, 6, 2), layers.Conv2D(8, 1, name="a"),
        getattr(layers, name)(**options), layers.Flatten(), layers.Dense(3),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"a"})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RandomErasing", {}), ("RandomShear", {"x_factor": (0.0, 0.2)}), ("RandomPerspective", {}),
        ("RandomGaussianBlur", {}), ("RandomInvert", {}), ("RandomPosterization", {"factor": 4}),
        ("RandomElasticTransform", {}), ("Solarization", {"addition_factor": 0.1}),
        ("CutMix", {}), ("MixUp", {}),
    ],
)  # fmt: skip
def test_augmentation_of_keras_3(name: str, options: dict[str, Any]) -> None:
    layers = keras.layers
    model = chain(
        keras, (6, 6, 2), layers.Conv2D(8, 1, name="a"), getattr(layers, name)(**options),
        layers.Flatten(), layers.Dense(3),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"a"})


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("name", ["Resizing", "CenterCrop"])
def test_resizing_lets_channels_pass(framework: Any, name: str) -> None:
    layers = framework.layers
    model = chain(
        framework, (8, 8, 2), layers.Conv2D(8, 1, name="a"), getattr(layers, name)(4, 4),
        layers.Flatten(), layers.Dense(3),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"a"})


def test_colours_stay() -> None:
    layers = keras.layers
    model = chain(
        keras, (6, 6, 2), layers.Conv2D(3, 1, name="a"), layers.RandomGrayscale(),
        layers.Conv2D(6, 3, name="b"), layers.Flatten(), layers.Dense(3),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"b"})
    assert "colours" in analyse(model)["a"].reason


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_vocabularies_of_data_are_carried_over(framework: Any) -> None:
    layers = framework.layers
    words = layers.StringLookup(name="words")
    words.adapt(np.array([["cat", "dog"], ["dog", "bird"]]))
    inputs = framework.Input((3,), dtype="string")
    x = layers.Embedding(5, 8, name="table")(words(inputs))
    model = framework.Model(inputs, layers.Dense(3)(x))
    batch = keras.ops.convert_to_tensor([["dog", "cat", "horse"]])
    small = assert_masked_equals_pruned(model, {"table"}, inputs=[batch])
    assert small.get_layer("words").get_vocabulary() == words.get_vocabulary()


def test_text_is_split_and_looked_up() -> None:
    layers = keras.layers
    text = layers.TextVectorization(output_sequence_length=4, name="text")
    text.adapt(["a cat and a dog", "the bird"])
    inputs = keras.Input((), dtype="string")
    x = layers.Embedding(10, 8, name="table")(text(inputs))
    model = keras.Model(inputs, layers.Dense(3)(x))
    batch = keras.ops.convert_to_tensor(["the cat", "a dog"])
    assert_masked_equals_pruned(model, {"table"}, inputs=[batch])


def test_categories_and_bins() -> None:
    layers = keras.layers
    bins, numbers = keras.Input((1,)), keras.Input((1,), dtype="int32")
    edges = layers.Discretization(num_bins=4, output_mode="one_hot")
    edges.adapt(np.random.default_rng(0).normal(size=(100, 1)))
    codes = layers.CategoryEncoding(5, output_mode="one_hot")
    hashed = layers.Hashing(6, output_mode="one_hot")
    x = layers.Concatenate()([edges(bins), codes(numbers), hashed(numbers)])
    x = layers.Dense(8, name="a")(x)
    model = keras.Model([bins, numbers], layers.Dense(3)(x))
    batch = [np.array([[0.3], [-2.0]], "float32"), np.array([[1], [4]], "int32")]
    assert_masked_equals_pruned(model, {"a"}, inputs=batch)


@pytest.mark.parametrize(
    "layer",
    [
        keras.layers.MelSpectrogram(num_mel_bins=8, fft_length=32, sequence_stride=16),
        keras.layers.STFTSpectrogram(frame_length=32, frame_step=16, fft_length=32),
    ],
)
def test_spectrograms(layer: Any) -> None:
    layers = keras.layers
    shape = (128,) if isinstance(layer, layers.MelSpectrogram) else (128, 1)
    model = chain(
        keras, shape, layer, layers.Conv1D(6, 1, name="a"), layers.Flatten(), layers.Dense(3)
    )
    assert_masked_equals_pruned(model, {"a"}, random_weights=False)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.image.resize(x, (4, 4)),
        lambda x: ops.image.pad_images(x, 1, 1, 1, 1),
        lambda x: ops.image.crop_images(x, 1, 1, 1, 1),
        lambda x: ops.image.affine_transform(x, np.array([[1, 0, 1, 0, 1, 0, 0, 0]], "float32")),
        lambda x: ops.image.gaussian_blur(x, (3, 3), (1.0, 1.0)),
        lambda x: ops.max_pool(x, 2),
        lambda x: ops.average_pool(x, 2, data_format="channels_last"),
    ],
)
def test_operations_on_images(function: Any) -> None:
    layers = keras.layers
    model = chain(
        keras, (6, 6, 2), layers.Conv2D(8, 1, name="a"), function, layers.Flatten(),
        layers.Dense(3),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"a"})
