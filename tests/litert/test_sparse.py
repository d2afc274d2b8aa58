"""tfprune.export(sparse=True): what is encoded, and which files are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tfprune
from tests.sparse_path.networks import block, network
from tfprune.errors import ArgumentError, ExportError, ModelError
from tfprune.litert import exporting

KERAS_PAD = ((0, 1), (0, 1))


def dense_network(block_rows: int = 1, zeros: float = 0.75) -> Any:
    """Two dense layers; zeros come in blocks of ``block_rows`` consecutive inputs."""
    import keras

    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(64, activation="relu", name="first"), keras.layers.Dense(32)]
    model = keras.Sequential([keras.Input((64,)), *layers], name="net")
    rng = np.random.default_rng(0)
    for layer in model.layers:
        values = layer.kernel.numpy().copy()
        keep = rng.random((values.shape[0] // block_rows, values.shape[1])) >= zeros
        layer.kernel.assign(values * np.repeat(keep, block_rows, axis=0))
    return model


@pytest.fixture(scope="module")
def sparse_net() -> Any:
    import keras

    return network(keras)


# One float32 sum of at most 72 terms per layer, as in test_exporting; and float16 weights, off by
# 2 ** -11 of themselves each, through six layers.
@pytest.mark.parametrize(("quantize", "largest"), [(None, 1e-5), ("float16", 6 * 2**-11)])
def test_sparse_equals_keras(sparse_net, tmp_path, run_litert, quantize, largest) -> None:
    dense = tfprune.export(sparse_net, tmp_path / "dense.tflite", quantize=quantize)
    report = tfprune.export(sparse_net, tmp_path / "sparse.tflite", quantize=quantize, sparse=True)

    x = np.random.default_rng(1).normal(size=(1, 16, 16, 3)).astype("float32")
    want = np.asarray(sparse_net(x))
    got = run_litert(report.path, image=x)["head"]
    assert np.abs(got - want).max() < largest * np.abs(want).max()
    assert report.comparison.relative_difference < largest

    assert report.size_bytes == report.path.stat().st_size
    assert report.operations["DENSIFY"] == 2
    assert dense.sparse is None and "DENSIFY" not in dense.operations
    found = report.sparse
    assert [t.shape for t in sorted(found.tensors, key=lambda t: t.layer)] == [(12, 1, 1, 12)] * 2
    layers = {layer.name for layer in sparse_net.layers}
    assert all(t.layer in layers and t.block == (1, 1, 1, 1) for t in found.tensors)
    # round(0.9 * 144) zeros in each 1x1 kernel; stem, two depthwise convolutions and head have none
    assert [t.sparsity for t in found.tensors] == [130 / 144] * 2
    assert found.sparsity == 260 / (288 + 9 * 3 * 12 + 2 * 9 * 12 + 12 * 3)
    assert found.path.verdict == "sparse"
    text = str(report)
    assert "90.3% zeros" in text and "computes 2 1x1 convolutions sparsely" in text
    assert "GPU delegates refuse sparse files" in text and "gzipped" in text
    assert [o.op for o in report.gpu.obstacles] == ["DENSIFY"] * 2


def test_smaller(tmp_path) -> None:
    model = dense_network(zeros=0.9)
    size = {
        (quantize, sparse): tfprune.export(
            model, tmp_path / "m.tflite", quantize=quantize, sparse=sparse
        ).size_bytes
        for quantize in (None, "float16")
        for sparse in (False, True)
    }
    # a tenth of the numbers, each with an index of a byte
    assert size[None, True] < 0.4 * size[None, False]
    assert size["float16", True] < 0.6 * size["float16", False]
    assert size["float16", True] < size[None, True]


@pytest.mark.parametrize("which", ["keras", "tf_keras"])
def test_of_both_keras(which, tmp_path) -> None:
    keras = pytest.importorskip(which)
    report = tfprune.export(network(keras), tmp_path / "m.tflite", sparse=True)
    assert report.sparse.path.verdict == "sparse"


def test_a_slow_one_is_written_and_said_to_be(tmp_path) -> None:
    import keras

    report = tfprune.export(network(keras, zeros=0.5), tmp_path / "m.tflite", sparse=True)
    assert report.sparse.path.verdict == "dense"
    assert "50.0% of the weights of its 2 1x1 convolutions" in str(report)


class TestRefused:
    @pytest.fixture(autouse=True)
    def nothing_is_left(self, tmp_path):
        yield
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"quantize": "int8", "calibration": np.zeros((2, 16, 16, 3))}, "int8 dense layer"),
            ({"quantize": "dynamic"}, "wrong outputs.*quantize='float16' with sparse=True"),
            ({"check": False}, "each is run before it is written"),
            ({"sparse": 1}, "sparse to be True or False"),
        ],
    )
    def test_arguments(self, sparse_net, tmp_path, arguments, message) -> None:
        with pytest.raises(ArgumentError, match=message):
            tfprune.export(sparse_net, tmp_path / "m.tflite", **{"sparse": True, **arguments})

    def test_too_few_zeros(self, tmp_path) -> None:
        import keras

        # the converter's threshold is 30 %: 43 of 144 are 29.9 %
        with pytest.raises(ArgumentError, match=r"has 29\.9% zeros"):
            tfprune.export(network(keras, zeros=0.297), tmp_path / "m.tflite", sparse=True)

    def test_zeros_that_the_converter_does_not_encode(self, tmp_path) -> None:
        import keras

        model = keras.Sequential([keras.Input((4, 4, 4, 2)), keras.layers.Conv3D(4, 3)])
        model.layers[0].kernel.assign(np.zeros(model.layers[0].kernel.shape))
        with pytest.raises(ExportError, match="it encoded none"):
            tfprune.export(model, tmp_path / "m.tflite", sparse=True)

    def test_nan_from_blocks_in_float16(self, tmp_path) -> None:
        """The same blocks are right in float32, and scattered zeros in both."""
        with pytest.raises(ExportError, match=r"NaN.*dense layer '\w+' lie in\s+blocks of 4"):
            tfprune.export(dense_network(4), tmp_path / "m.tflite", quantize="float16", sparse=True)
        for model, quantize in ((dense_network(4), None), (dense_network(1), "float16")):
            report = tfprune.export(model, tmp_path / "m", quantize=quantize, sparse=True)
            report.path.unlink()
            assert [t.block for t in report.sparse.tensors] == [(1, 1 if quantize else 4)] * 2

    def test_a_file_that_no_interpreter_loads(self, tmp_path, monkeypatch) -> None:
        """sparse int8 dense layers: not to be had through the arguments, so made by hand."""
        monkeypatch.setattr(exporting, "convert_sparse", lambda model, float16: _sparse_int8(model))
        with pytest.raises(ExportError, match=r"LiteRT can run\. It refuses this one"):
            tfprune.export(dense_network(), tmp_path / "m.tflite", sparse=True)

    @pytest.mark.parametrize(
        ("part", "message"),
        [
            (
                {"middle": lambda k, x: block(k, x, KERAS_PAD)},
                r"DEPTHWISE_CONV_2D '\w+': a 3x3 .* padding 1 on all four sides",
            ),
            (
                {
                    "end": lambda k, x: k.layers.Conv2D(3, 1)(
                        k.layers.GlobalAveragePooling2D(keepdims=True, name="pool")(x)
                    )
                },
                "MEAN 'pool'.*Dense behind it in place of a 1x1",
            ),
        ],
    )
    def test_wrong_on_phones_alone(self, tmp_path, part, message) -> None:
        """On this machine, with AVX, these files would pass the check."""
        import keras

        with pytest.raises(ExportError, match=message) as caught:
            tfprune.export(network(keras, **part), tmp_path / "m.tflite", sparse=True)
        assert "Nothing was written" in str(caught.value)

    @pytest.mark.parametrize("sparse", [False, True])
    def test_pruning_wrappers(self, tmp_path, sparse) -> None:
        import keras

        class PruneLowMagnitude(keras.layers.Wrapper):
            is_pruning_wrapper = True

            def call(self, x):
                return self.layer(x)

        wrapped = PruneLowMagnitude(keras.layers.Dense(3), name="wrapped")
        inner = keras.Sequential([keras.Input((4,)), wrapped])
        model = keras.Sequential([keras.Input((4,)), inner])
        with pytest.raises(ModelError, match=r"such as 'wrapped'.*strip_pruning\(model\)"):
            tfprune.export(model, tmp_path / "m.tflite", sparse=sparse)

    def test_wrappers_of_tfmot(self, tmp_path) -> None:
        tf_keras = pytest.importorskip("tf_keras")
        schedules = pytest.importorskip("tfprune.schedules.tfmot")
        model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,))])
        pruned = schedules.load().sparsity.keras.prune_low_magnitude(model)
        with pytest.raises(ModelError, match=r"strip_pruning\(model\)"):
            tfprune.export(pruned, tmp_path / "m.tflite")


def _sparse_int8(model: Any) -> bytes:
    import tensorflow as tf

    from tfprune.litert.convert import concrete_function, float_converter
    from tfprune.litert.quiet import captured_output

    rng = np.random.default_rng(0)
    with captured_output():
        converter = float_converter(model, concrete_function(model))
        converter.optimizations = [
            tf.lite.Optimize.DEFAULT,
            tf.lite.Optimize.EXPERIMENTAL_SPARSITY,
        ]
        shape, name = model.inputs[0].shape, model.inputs[0].name
        converter.representative_dataset = lambda: (
            {name: rng.normal(size=shape).astype("float32")} for _ in range(4)
        )
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        return bytes(converter.convert())


def test_the_judgement_can_fail(sparse_net, tmp_path, monkeypatch) -> None:
    """A float16 file of another model is found out, though float16 is not judged when dense."""
    import keras

    from tfprune.litert.keras_model import keras_model

    other = keras.models.clone_model(sparse_net)
    other.set_weights([w * np.float32(1.05) for w in sparse_net.get_weights()])
    wrong = exporting.convert_sparse(keras_model(other), float16=True)
    monkeypatch.setattr(exporting, "convert_sparse", lambda model, float16: wrong)
    with pytest.raises(ExportError, match=r"to 1\.0e-02 of the"):
        tfprune.export(sparse_net, tmp_path / "m.tflite", quantize="float16", sparse=True)
    assert list(tmp_path.iterdir()) == []
