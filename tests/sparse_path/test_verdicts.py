"""What XNNPACK makes of networks: as it was measured, from the Keras model and from the file.

The verdicts in ``MEASURED`` were taken from LiteRT 2.3.0 itself, on the same networks in larger,
with the processor's AVX hidden from it. ``python -m benchmarks.sparse_path`` does it again.
"""

from __future__ import annotations

import numpy as np
import pytest

from tfprune.litert import sparse_path
from tfprune.litert.convert import convert, convert_sparse
from tfprune.litert.keras_model import keras_model
from tfprune.sparse_path import keras_sparse_path

from .networks import KERAS_PAD, NETWORKS, WIDTH, block, network, part, stem

MEASURED = {
    "plain": ("sparse", ""),
    "70 %": ("sparse", ""),
    "68 %": ("sparse", ""),
    "65 %": ("dense", "65.3% of the weights of its 2 1x1 convolutions"),
    "60 %": ("dense", "XNNPACK wants more than two thirds"),
    "50 %": ("dense", "XNNPACK wants more than two thirds"),
    "Keras's stem": ("dense", "padding 1 on all four sides"),
    "stem with padding 'same'": ("dense", "padding 1 on all four sides"),
    "stem without padding": ("dense", "padding 1 on all four sides"),
    "grey image": ("dense", "1 input channels"),
    "symmetric stride": ("sparse", ""),
    "5x5": ("sparse", ""),
    "Keras's stride": ("broken", "padding 1 on all four sides"),
    "7x7": ("broken", "Use 3x3 or 5x5"),
    "depthwise without padding": ("broken", "no padding"),
    "depth multiplier": ("broken", "depth_multiplier=2"),
    "dilation": ("broken", "dilated"),
    "residual": ("sparse", ""),
    "gate": ("sparse", ""),
    "gate with tanh": ("broken", "a mean with keepdims=True"),
    "gate of dense layers": ("dense", ""),
    "swish": ("sparse", ""),
    "hard swish": ("sparse", ""),
    "hard sigmoid": ("broken", ""),
    "softplus": ("broken", ""),
    "PReLU": ("broken", ""),
    "bilinear": ("sparse", ""),
    "max pooling": ("broken", ""),
    "concatenation": ("broken", ""),
    "dense connection": ("dense", ""),
    "3x3": ("broken", "a 3x3 convolution"),
    "strided 1x1": ("broken", "with stride 2x2"),
    "groups": ("broken", "in 2 groups"),
    # a third of the 1x1 weights, and none of them zero
    "dense layer along channels": ("dense", "60.2% of the weights of its 3 1x1 convolutions"),
    "lone normalisation": ("broken", "with a constant"),
    "number added": ("broken", "with a constant"),
    "numbers added": ("broken", "with a constant"),
    "factors": ("broken", "with a constant"),
    "subtraction": ("dense", ""),
    "x + x": ("dense", "one tensor twice"),
    "convolution behind the pool": ("broken", "Dense behind it"),
    "flattened pool": ("sparse", ""),
    "pool as output": ("broken", "the wrong shape"),
    "mean over height": ("broken", "over the axes [1]"),
    "max at the end": ("dense", ""),
    "average pooling at the end": ("dense", ""),
    "feature output": ("dense", "an output of the model"),
    "side branch": ("broken", "an output of the model"),
}


# A conversion takes most of a second: here one for each kind of record that a file is turned into;
# the benchmark does it for all.
CONVERTED = (
    "plain", "65 %", "Keras's stem", "Keras's stride", "residual", "gate", "gate of dense layers",
    "hard swish", "hard sigmoid", "PReLU", "bilinear", "concatenation", "groups",
    "dense layer along channels", "lone normalisation", "factors", "x + x",
    "convolution behind the pool", "flattened pool", "mean over height", "side branch",
)  # fmt: skip


def test_every_network_was_measured() -> None:
    assert NETWORKS.keys() == MEASURED.keys()


@pytest.mark.parametrize("name", sorted(MEASURED.keys() - set(CONVERTED)))
def test_keras_model_as_measured(name: str) -> None:
    import keras

    verdict, text = MEASURED[name]
    found = keras_sparse_path(network(keras, **NETWORKS[name]))
    assert found.verdict == verdict
    assert text in found.blocker
    assert (found.blocker == "") == (verdict == "sparse")


@pytest.mark.parametrize("name", CONVERTED)
def test_model_and_file_as_measured(name: str) -> None:
    import keras

    verdict, text = MEASURED[name]
    model = network(keras, **NETWORKS[name])
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
    report = keras_sparse_path(
        network(keras, begin=lambda k, x, width: stem(k, x, width, KERAS_PAD))
    )
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
    assert [np.prod(layer.kernel.shape) for layer in (small, wide, last)] == [144, 288, 576]
    wide.kernel.assign(np.zeros(wide.kernel.shape))
    # 288 of 1008
    assert keras_sparse_path(model).verdict == "dense"
    last.kernel.assign(np.zeros(last.kernel.shape))
    # 864 of 1008
    report = keras_sparse_path(model)
    assert report.verdict == "sparse" and report.sparsity == 864 / 1008
