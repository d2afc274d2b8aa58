"""What XNNPACK makes of networks: as it was measured, from the Keras model and from the file.

The verdicts in ``MEASURED`` were taken from LiteRT 2.3.0 itself, on larger networks of the same
make, with the processor's AVX hidden from it: "sparse" where the file was at least twice as fast as
the dense one and equal to it, "dense" where it was as slow and equal, "broken" where it did not
load, or its outputs differed by a tenth of the largest or in shape.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tfprune.litert import sparse_path
from tfprune.litert.convert import convert, convert_sparse
from tfprune.litert.keras_model import keras_model
from tfprune.sparse_path import keras_sparse_path

from .networks import WIDTH, block, network, pooled, stem


def gate(keras: Any, x: Any, inner: Any = lambda keras, s: s) -> Any:
    """Squeeze and excitation."""
    layers = keras.layers
    s = inner(keras, layers.GlobalAveragePooling2D(keepdims=True)(x))
    s = layers.Conv2D(4, 1, activation="relu")(s)
    return layers.Multiply()([x, layers.Conv2D(WIDTH, 1, activation="sigmoid")(s)])


def head(keras: Any, x: Any, keepdims: bool = True) -> Any:
    return keras.layers.Conv2D(3, 1)(keras.layers.GlobalAveragePooling2D(keepdims=keepdims)(x))


def part(name: str, *arguments: Any, **options: Any) -> Any:
    return lambda keras, x: getattr(keras.layers, name)(*arguments, **options)(x)


KERAS_PAD = ((0, 1), (0, 1))
ENLARGE = part("UpSampling2D", interpolation="bilinear")
MEASURED = {
    "plain": ({}, "sparse", ""),
    "68 %": ({"zeros": 0.68}, "sparse", ""),
    "65 %": ({"zeros": 0.65}, "dense", "65.3% of the weights of its 2 1x1 convolutions"),
    "Keras's stem": (
        {"begin": lambda k, x: stem(k, x, KERAS_PAD)},
        "dense",
        "padding 1 on all four sides",
    ),
    "grey image": ({"channels": 1}, "dense", "1 input channels"),
    "symmetric stride": ({"middle": lambda k, x: block(k, x, 1)}, "sparse", ""),
    "5x5": ({"middle": lambda k, x: block(k, x, 2, 5)}, "sparse", ""),
    "Keras's stride": (
        {"middle": lambda k, x: block(k, x, KERAS_PAD)},
        "broken",
        "padding 1 on all four sides",
    ),
    "7x7": ({"middle": lambda k, x: block(k, x, 3, 7)}, "broken", "Use 3x3 or 5x5"),
    "residual": ({"middle": lambda k, x: k.layers.Add()([x, block(k, x)])}, "sparse", ""),
    "gate": ({"middle": gate}, "sparse", ""),
    "gate with tanh": (
        {"middle": lambda k, x: gate(k, x, part("Activation", "tanh"))},
        "broken",
        "a mean with keepdims=True",
    ),
    "swish": ({"middle": part("Activation", "swish")}, "sparse", ""),
    "softplus": ({"middle": part("Activation", "softplus")}, "broken", ""),
    "bilinear": ({"middle": ENLARGE}, "sparse", ""),
    "max pooling": ({"middle": part("MaxPooling2D", 2)}, "broken", ""),
    "3x3": ({"middle": part("Conv2D", WIDTH, 3, padding="same")}, "broken", "a 3x3 convolution"),
    "strided 1x1": ({"middle": part("Conv2D", WIDTH, 1, strides=2)}, "broken", "with stride 2x2"),
    "groups": ({"middle": part("Conv2D", WIDTH, 1, groups=2)}, "broken", "in 2 groups"),
    "dilation": (
        {"middle": part("DepthwiseConv2D", 3, padding="same", dilation_rate=2)},
        "broken",
        "dilated",
    ),
    "lone normalisation": (
        {"middle": lambda k, x: k.layers.BatchNormalization()(k.layers.Add()([x, block(k, x)]))},
        "broken",
        "with a constant",
    ),
    "subtraction": ({"middle": lambda k, x: k.layers.Subtract()([x, block(k, x)])}, "dense", ""),
    "x + x": ({"middle": lambda k, x: k.layers.Add()([x, x])}, "dense", "one tensor twice"),
    "convolution behind the pool": ({"end": head}, "broken", "Dense behind it"),
    "flattened pool": (
        {
            "end": lambda k, x: k.layers.Dense(3)(
                k.layers.Flatten()(k.layers.GlobalAveragePooling2D(keepdims=True)(x))
            )
        },
        "sparse",
        "",
    ),
    "pool as output": (
        {"end": part("GlobalAveragePooling2D", keepdims=True)},
        "broken",
        "the wrong shape",
    ),
    "max at the end": ({"end": part("GlobalMaxPooling2D")}, "dense", ""),
    "feature output": ({"end": lambda k, x: [pooled(k, x), x]}, "dense", "an output of the model"),
    "side branch": (
        {"end": lambda k, x: [pooled(k, x), k.layers.Conv2D(2, 1)(x)]},
        "broken",
        "an output of the model",
    ),
}


@pytest.mark.parametrize("name", MEASURED)
def test_as_measured(name: str) -> None:
    import keras

    options, verdict, text = MEASURED[name]
    model = network(keras, **options)
    from_file = sparse_path(convert_sparse(keras_model(model), float16=False))
    from_model = keras_sparse_path(model)
    assert (from_file.verdict, from_model.verdict) == (verdict, verdict)
    assert text in from_file.blocker and text in from_model.blocker
    assert (from_file.blocker == "") == (verdict == "sparse")
    # kernels count alike in both
    assert (from_file.zeros, from_file.parameters) == (from_model.zeros, from_model.parameters)


def test_float16_counts_like_float32() -> None:
    import keras

    model = keras_model(network(keras))
    full = sparse_path(convert_sparse(model, float16=False))
    half = sparse_path(convert_sparse(model, float16=True))
    assert half.verdict == full.verdict == "sparse"
    assert (half.zeros, half.parameters) == (full.zeros, full.parameters) == (2 * 130, 2 * 144)


def test_a_dense_file_is_dense(tmp_path) -> None:
    """XNNPACK does not look for zeros in it, however many there are."""
    import keras

    path = tmp_path / "dense.tflite"
    path.write_bytes(convert(keras_model(network(keras))))
    report = sparse_path(path)
    assert report.verdict == "dense" and "sparse=True" in report.remedy


def test_integers_are_dense() -> None:
    import keras

    from tfprune.litert import quantize

    content = convert_sparse(keras_model(network(keras, zeros=0.9)), float16=False)
    assert sparse_path(content).verdict == "sparse"
    # the quantizer makes dense kernels of the sparse ones, or fails on them
    dense = quantize.dynamic(convert(keras_model(network(keras))))
    assert sparse_path(dense).verdict == "dense"


@pytest.mark.parametrize("keras_name", ["keras", "tf_keras"])
def test_blockers_have_names(keras_name: str) -> None:
    keras = pytest.importorskip(keras_name)
    report = keras_sparse_path(network(keras, begin=lambda k, x: stem(k, x, KERAS_PAD)))
    assert report.layer == "Conv2D 'stem'"
    assert "(from ZeroPadding2D 'stem_pad')" in report.reason
    assert "train it so" in report.remedy
    assert str(report).startswith("XNNPACK computes this densely everywhere")


def test_nested_models_are_walked() -> None:
    import keras

    inner_input = keras.Input((8, 8, WIDTH))
    inner = keras.Model(inner_input, block(keras, inner_input), name="inner")
    plain = network(keras, middle=lambda k, x: inner(x))
    report = keras_sparse_path(plain)
    assert report.verdict == "sparse" and len(report.convolutions) == 3
    assert report.convolutions[1].startswith("inner/conv2d")

    cut_input = keras.Input((8, 8, WIDTH))
    pool = keras.layers.MaxPooling2D(name="pool")(cut_input)
    cut = keras.Model(cut_input, block(keras, pool), name="inner")
    report = keras_sparse_path(network(keras, middle=lambda k, x: cut(x)))
    assert report.layer == "MaxPooling2D 'inner/pool'"


def test_the_sparsity_to_come() -> None:
    import keras

    model = network(keras, zeros=0.0)
    assert keras_sparse_path(model).verdict == "dense"
    assert keras_sparse_path(model, sparsity=0.7).verdict == "sparse"
    assert keras_sparse_path(model, sparsity=0.6).verdict == "dense"


def test_all_kernels_of_a_cluster_count_together() -> None:
    """Two thirds of all of them must be zero, not of each."""
    import keras

    model = network(keras, middle=part("Conv2D", 2 * WIDTH, 1), zeros=0.0)
    small, wide, last = (
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.Conv2D) and layer.kernel_size == (1, 1)
    )
    assert [np.prod(layer.kernel.shape) for layer in (small, wide, last)] == [144, 288, 288]
    wide.kernel.assign(np.zeros(wide.kernel.shape))
    # 288 of 720
    assert keras_sparse_path(model).verdict == "dense"
    last.kernel.assign(np.zeros(last.kernel.shape))
    # 576 of 720
    report = keras_sparse_path(model)
    assert report.verdict == "sparse" and report.sparsity == 0.8
