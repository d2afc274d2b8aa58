"""Which weights are pruned: every layer of Keras has an answer."""

from __future__ import annotations

import inspect

import keras
import numpy as np
import pytest

import tfprune
from tests.layers.twins import tfmot
from tfprune.errors import ModelError
from tfprune.layers import prunable_weights
from tfprune.layers.prunable import DENSE_ONLY, KERNELS, OPAQUE, prunable_of

layers = keras.layers

# One built example of every kind of layer that has weights, and what is pruned of it.
EXAMPLES = {
    "Conv1D": (lambda: layers.Conv1D(4, 3), (8, 3), ["kernel"]),
    "Conv2D": (lambda: layers.Conv2D(4, 3, groups=2), (8, 8, 4), ["kernel"]),
    "Conv3D": (lambda: layers.Conv3D(4, 3), (5, 5, 5, 2), ["kernel"]),
    "Conv1DTranspose": (lambda: layers.Conv1DTranspose(4, 3), (8, 3), ["kernel"]),
    "Conv2DTranspose": (lambda: layers.Conv2DTranspose(4, 3), (8, 8, 3), ["kernel"]),
    "Conv3DTranspose": (lambda: layers.Conv3DTranspose(4, 3), (5, 5, 5, 2), ["kernel"]),
    "SeparableConv1D": (lambda: layers.SeparableConv1D(4, 3), (8, 3), ["pointwise_kernel"]),
    "SeparableConv2D": (lambda: layers.SeparableConv2D(4, 3), (8, 8, 3), ["pointwise_kernel"]),
    "Dense": (lambda: layers.Dense(4), (3,), ["kernel"]),
    "EinsumDense": (lambda: layers.EinsumDense("abc,cd->abd", (None, 4)), (5, 3), ["kernel"]),
    "Embedding": (lambda: layers.Embedding(9, 4), (5,), ["embeddings"]),
    "ReversibleEmbedding": (
        lambda: layers.ReversibleEmbedding(9, 4, tie_weights=False),
        (5,),
        ["embeddings", "reverse_embeddings"],
    ),
    "SimpleRNN": (
        lambda: layers.SimpleRNN(4, name="r"),
        (5, 3),
        ["simple_rnn_cell/kernel", "simple_rnn_cell/recurrent_kernel"],
    ),
    "LSTM": (lambda: layers.LSTM(4), (5, 3), ["lstm_cell/kernel", "lstm_cell/recurrent_kernel"]),
    "GRU": (lambda: layers.GRU(4), (5, 3), ["gru_cell/kernel", "gru_cell/recurrent_kernel"]),
    "ConvLSTM1D": (
        lambda: layers.ConvLSTM1D(2, 3),
        (4, 8, 3),
        ["conv_lstm_cell/kernel", "conv_lstm_cell/recurrent_kernel"],
    ),
    "ConvLSTM2D": (
        lambda: layers.ConvLSTM2D(2, 3),
        (4, 8, 8, 3),
        ["conv_lstm_cell/kernel", "conv_lstm_cell/recurrent_kernel"],
    ),
    "ConvLSTM3D": (
        lambda: layers.ConvLSTM3D(2, 3),
        (3, 5, 5, 5, 2),
        ["conv_lstm_cell/kernel", "conv_lstm_cell/recurrent_kernel"],
    ),
    "RNN": (
        lambda: layers.RNN(
            layers.StackedRNNCells(
                [layers.GRUCell(3, name="first"), layers.LSTMCell(4, name="second")]
            )
        ),
        (5, 3),
        ["first/kernel", "first/recurrent_kernel", "second/kernel", "second/recurrent_kernel"],
    ),
    "Bidirectional": (
        lambda: layers.Bidirectional(layers.GRU(3)),
        (5, 3),
        [
            "gru_cell/kernel",
            "gru_cell/recurrent_kernel",
            "gru_cell/kernel_1",
            "gru_cell/recurrent_kernel_1",
        ],
    ),
    "TimeDistributed": (
        lambda: layers.TimeDistributed(layers.Dense(4, name="inner")),
        (5, 3),
        ["inner/kernel"],
    ),
    "SpectralNormalization": (
        lambda: layers.SpectralNormalization(layers.Conv2D(4, 3, name="inner")),
        (8, 8, 3),
        ["inner/kernel"],
    ),
    "DepthwiseConv1D": (lambda: layers.DepthwiseConv1D(3), (8, 3), []),
    "DepthwiseConv2D": (lambda: layers.DepthwiseConv2D(3), (8, 8, 3), []),
    "BatchNormalization": (layers.BatchNormalization, (8, 8, 3), []),
    "LayerNormalization": (layers.LayerNormalization, (5, 3), []),
    "GroupNormalization": (lambda: layers.GroupNormalization(2), (5, 4), []),
    "RMSNormalization": (layers.RMSNormalization, (5, 3), []),
    "Normalization": (layers.Normalization, (3,), []),
    "PReLU": (layers.PReLU, (3,), []),
    "STFTSpectrogram": (layers.STFTSpectrogram, (600, 1), []),
}
# Attention, with several inputs.
ATTENTION = {
    "MultiHeadAttention": (
        lambda: layers.MultiHeadAttention(2, 4, name="attention"),
        ["query/kernel", "key/kernel", "value/kernel", "attention_output/kernel"],
    ),
    "GroupedQueryAttention": (
        lambda: layers.GroupQueryAttention(4, 4, 2, name="attention"),
        ["query/kernel", "key/kernel", "value/kernel", "attention_output/kernel"],
    ),
    "Attention": (lambda: layers.Attention(use_scale=True), []),
    "AdditiveAttention": (layers.AdditiveAttention, []),
}
# Abstract classes, cells (in the recurrent layers above) and layers of foreign code.
ELSEWHERE = {
    "Layer", "Wrapper", "RNN", "StackedRNNCells", "SimpleRNNCell", "LSTMCell", "GRUCell",
    "InputLayer", *(cls.__name__ for cls in OPAQUE),
}  # fmt: skip


def _names(layer):
    return [weight.name for weight in prunable_of(layer)]


@pytest.mark.parametrize("name", EXAMPLES)
def test_layers_with_one_input(name) -> None:
    make, shape, expected = EXAMPLES[name]
    layer = make()
    dtype = "int32" if "Embedding" in name else "float32"
    inputs = keras.Input(shape, dtype=dtype)
    model = keras.Model(inputs, layer(inputs))
    assert _names(layer) == expected
    if not expected:
        with pytest.raises(ModelError, match="with weights to prune"):
            tfprune.prune_low_magnitude(model)
        return
    random = np.random.default_rng(0)
    x = random.integers(0, 9, (4, *shape)) if dtype == "int32" else random.random((4, *shape))
    schedule = tfmot.ConstantSparsity(0.5, 0, frequency=1)
    wrapped = tfprune.prune_low_magnitude(model, schedule)
    np.testing.assert_array_equal(np.asarray(wrapped(x)), np.asarray(model(x)))
    callback = tfprune.UpdatePruningStep()
    callback.set_model(wrapped)
    callback.on_train_begin()
    wrapped(x, training=True)
    for path, variable in prunable_weights(tfprune.strip_pruning(wrapped)).items():
        value = np.asarray(variable)
        # keeps round(N / 2), half to even as in tfmot
        assert np.count_nonzero(value) == round(value.size / 2), path


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name) -> None:
    make, expected = ATTENTION[name]
    query, value = keras.Input((4, 6)), keras.Input((5, 6))
    layer = make()
    inputs = [query, value]
    outputs = layer(query, value) if expected else layer(inputs)
    model = keras.Model(inputs, outputs)
    assert _names(layer) == expected
    if not expected:
        return
    wrapped = tfprune.prune_low_magnitude(model, tfmot.ConstantSparsity(0.5, 0, frequency=1))
    random = np.random.default_rng(0)
    x = [random.random((2, 4, 6)), random.random((2, 5, 6))]
    np.testing.assert_array_equal(np.asarray(wrapped(x)), np.asarray(model(x)))
    # not built before it is wrapped, as in tfmot's guide
    fresh = tfprune.prune_low_magnitude(make())
    again = keras.Model(inputs, fresh(query, value))
    assert list(prunable_weights(again)) == [f"attention/{part}" for part in expected]


def test_every_layer_of_keras_has_an_answer() -> None:
    """Layers with trainable weights are above; the others have none."""
    classes = {
        cls.__name__: cls
        for _, cls in inspect.getmembers(layers, inspect.isclass)
        if issubclass(cls, layers.Layer)
    }
    known = {*EXAMPLES, *ATTENTION, *ELSEWHERE}
    assert known <= set(classes)
    assert {cls.__name__ for cls in (*KERNELS, *DENSE_ONLY)} - {"ConvLSTMCell"} <= known
    for name in set(classes) - known:
        # a layer that makes weights in build() or its constructor says so by add_weight
        source = "".join(
            inspect.getsource(cls)
            for cls in classes[name].__mro__
            if cls.__module__.startswith("keras.src.layers.")
            and cls is not layers.Layer
            and cls.__name__ not in ("BaseImagePreprocessingLayer", "DataLayer")
        )
        assert "add_weight(" not in source, f"{name} has weights: say what is pruned of it"


class _Own(layers.Layer):
    def build(self, shape):
        self.table = self.add_weight(shape=(shape[-1], 2))

    def call(self, x):
        return keras.ops.matmul(x, self.table)


class _Block(layers.Layer):
    """Weights only in the layers inside."""

    def __init__(self, inner=None, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(5, name="first")
        self.second = layers.Dense(4, name="second") if inner is None else inner

    def build(self, shape):
        self.first.build(shape)
        self.second.build((*shape[:-1], 5))

    def call(self, x):
        return self.second(self.first(x))


def _model(layer):
    inputs = keras.Input((3,))
    nested = keras.Sequential([keras.Input((3,)), layer], name="nested")
    return keras.Model(inputs, layers.Dense(2)(nested(inputs)))


def test_a_custom_layer_with_weights_of_its_own_is_named_with_its_path() -> None:
    with pytest.raises(ModelError, match=r"_Own at 'nested/odd'.*get_prunable_weights"):
        tfprune.prune_low_magnitude(_model(_Own(name="odd")))


def test_a_custom_layer_made_of_known_layers_is_walked() -> None:
    model = _model(_Block(name="block"))
    assert list(prunable_weights(tfprune.prune_low_magnitude(model)))[:2] == [
        "nested/block/first/kernel",
        "nested/block/second/kernel",
    ]
    with pytest.raises(ModelError, match="_Own at 'nested/block/odd'"):
        tfprune.prune_low_magnitude(_model(_Block(_Own(name="odd"), name="block")))


def test_what_get_prunable_weights_says_counts() -> None:
    class Dense(_Own):
        def get_prunable_weights(self):
            return []

    model = _model(Dense(name="odd"))
    assert list(prunable_weights(model)) == [f"{model.layers[-1].name}/kernel"]


def test_a_subclass_is_pruned_like_its_base() -> None:
    class MyDense(layers.Dense):
        pass

    assert "nested/mine/kernel" in prunable_weights(_model(MyDense(3, name="mine")))


def test_low_rank_adapters_are_refused() -> None:
    model = _model(layers.Dense(3, name="adapted"))
    model.get_layer("nested").get_layer("adapted").enable_lora(1)
    with pytest.raises(ModelError, match=r"'kernel' of Dense at 'nested/adapted'.*adapter"):
        tfprune.prune_low_magnitude(model)


def test_a_layer_that_is_walked_twice_counts_once() -> None:
    shared = layers.Dense(3, name="shared")
    inputs = keras.Input((3,))
    model = keras.Model(inputs, shared(shared(inputs)))
    assert list(prunable_weights(model)) == ["shared/kernel"]
    wrapped = tfprune.prune_low_magnitude(model)
    assert len([layer for layer in wrapped.layers if hasattr(layer, "pruning_vars")]) == 1
