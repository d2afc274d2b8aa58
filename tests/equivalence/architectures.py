"""Small networks as their users write them: one per family of architectures.

Every builder returns a Keras 3 model with layers of a few channels and random weights.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import layers, ops

from tfprune.graph import RuleCall
from tfprune.graph.labels import TensorLabels
from tfprune.graph.rules import rule


@keras.saving.register_keras_serializable("tfprune_tests")
class ClassToken(layers.Layer):
    """A learned token in front of the sequence."""

    def build(self, shape: Any) -> None:
        self.token = self.add_weight(shape=(1, 1, shape[-1]), name="token")

    def call(self, x: Any) -> Any:
        token = ops.broadcast_to(self.token, (ops.shape(x)[0], 1, ops.shape(x)[-1]))
        return ops.concatenate([token, x], axis=1)

    def compute_output_shape(self, shape: Any) -> Any:
        return (shape[0], shape[1] + 1, shape[2])


@keras.saving.register_keras_serializable("tfprune_tests")
class Positions(layers.Layer):
    """A learned vector per position, added."""

    def build(self, shape: Any) -> None:
        self.table = self.add_weight(shape=(shape[1], shape[2]), name="table")

    def call(self, x: Any) -> Any:
        return x + self.table


@rule(ClassToken)
def _class_token(call: RuleCall) -> TensorLabels:
    labels = call.inputs[0]
    call.weight(call.op.token, "token", follows={-1: labels[-1]})
    return labels


@rule(Positions)
def _positions(call: RuleCall) -> TensorLabels:
    labels = call.inputs[0]
    call.weight(call.op.table, "table", follows={-1: labels[-1]})
    return labels


def _conv(x: Any, filters: int, size: int = 3, **options: Any) -> Any:
    x = layers.Conv2D(filters, size, padding="same", use_bias=False, **options)(x)
    x = layers.BatchNormalization()(x)
    return layers.ReLU()(x)


def unet() -> Any:
    """Transposed convolutions upwards, concatenated skips."""
    x = inputs = keras.Input((16, 16, 3))
    skips = []
    for width in (8, 12):
        x = _conv(_conv(x, width), width)
        skips.append(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Dropout(0.2)(_conv(x, 16))
    for width, skip in zip((12, 8), reversed(skips), strict=True):
        x = layers.Conv2DTranspose(width, 2, strides=2, padding="same")(x)
        x = layers.concatenate([x, skip])
        x = _conv(_conv(x, width), width)
    return keras.Model(inputs, layers.Conv2D(2, 1, activation="softmax", name="mask")(x))


def detector() -> Any:
    """A feature pyramid with heads that all levels share, reshaped and concatenated."""
    inputs = keras.Input((32, 32, 3), name="image")
    c2 = _conv(inputs, 8, strides=4)
    c3 = _conv(c2, 12, strides=2)
    c4 = _conv(c3, 16, strides=2)
    p4 = layers.Conv2D(8, 1, name="lateral4")(c4)
    p3 = layers.Add()([layers.Conv2D(8, 1, name="lateral3")(c3), layers.UpSampling2D()(p4)])
    p2 = layers.Add()([layers.Conv2D(8, 1, name="lateral2")(c2), layers.UpSampling2D()(p3)])
    tower = keras.Sequential(
        [keras.Input((None, None, 8)), layers.Conv2D(10, 3, padding="same", activation="relu")]
    )
    classes = layers.Conv2D(3 * 4, 3, padding="same", name="classes")
    boxes = layers.Conv2D(3 * 4, 3, padding="same", name="boxes")
    levels = [tower(p) for p in (p2, p3, p4)]
    scores = [layers.Reshape((-1, 4))(classes(level)) for level in levels]
    places = [layers.Reshape((-1, 4))(boxes(level)) for level in levels]
    outputs = {
        "classes": layers.Activation("softmax")(layers.Concatenate(axis=1)(scores)),
        "boxes": layers.Concatenate(axis=1)(places),
    }
    return keras.Model({"image": inputs}, outputs)


def _encoder(x: Any, heads: int = 4, width: int = 16) -> Any:
    y = layers.LayerNormalization(epsilon=1e-6)(x)
    y = layers.MultiHeadAttention(heads, width // heads, dropout=0.1)(y, y)
    x = layers.Add()([x, y])
    y = layers.LayerNormalization(epsilon=1e-6)(x)
    y = layers.Dense(2 * width, activation="gelu")(y)
    y = layers.Dropout(0.1)(y)
    return x + layers.Dense(width)(y)


def text_encoder() -> Any:
    """A transformer encoder over token numbers, positions by a second embedding."""
    tokens = keras.Input((7,), dtype="int32")
    positions = layers.Embedding(7, 16, name="positions")(ops.arange(7))
    x = layers.Embedding(20, 16, mask_zero=False, name="tokens")(tokens)
    x = x + positions
    x = _encoder(_encoder(x))
    x = layers.LayerNormalization()(x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, layers.Dense(3)(x))


def vision_transformer() -> Any:
    """Patches, class token and positions as layers of the user's own, a head on the token."""
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(16, 4, strides=4, name="patches")(inputs)
    x = layers.Reshape((16, 16))(x)
    x = Positions()(ClassToken()(x))
    x = _encoder(_encoder(x))
    x = layers.LayerNormalization()(x)
    return keras.Model(inputs, layers.Dense(3)(x[:, 0]))


def shufflenet() -> Any:
    """Group convolutions with a channel shuffle between them."""

    def unit(x: Any, width: int, groups: int) -> Any:
        y = layers.Conv2D(width, 1, groups=groups, use_bias=False)(x)
        y = layers.ReLU()(layers.BatchNormalization()(y))
        height, breadth = y.shape[1:3]
        y = layers.Reshape((height, breadth, groups, width // groups))(y)
        y = layers.Permute((1, 2, 4, 3))(y)
        y = layers.Reshape((height, breadth, width))(y)
        y = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(y)
        y = layers.BatchNormalization()(y)
        y = layers.Conv2D(x.shape[-1], 1, groups=groups, use_bias=False)(y)
        return layers.ReLU()(layers.add([x, layers.BatchNormalization()(y)]))

    inputs = keras.Input((8, 8, 3))
    x = _conv(inputs, 16)
    x = unit(unit(x, 16, 2), 16, 2)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def squeeze_and_excite() -> Any:
    """A residual net with gates, written with reshapes and multiplications."""
    inputs = keras.Input((8, 8, 3))
    x = _conv(inputs, 16)
    for _ in range(2):
        y = _conv(x, 16)
        gate = layers.Reshape((1, 1, 16))(layers.GlobalAveragePooling2D()(y))
        gate = layers.Dense(4, activation="relu", kernel_initializer="he_normal")(gate)
        gate = layers.Dense(16, activation="sigmoid", use_bias=False)(gate)
        x = layers.ReLU()(layers.Add()([x, layers.multiply([y, gate])]))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalMaxPooling2D()(x)))


def cbam() -> Any:
    """Channel attention with a shared network, then spatial attention over all channels."""
    inputs = keras.Input((8, 8, 3))
    x = _conv(inputs, 16)
    first, second = layers.Dense(4, activation="relu"), layers.Dense(16)
    average = second(first(layers.GlobalAveragePooling2D()(x)))
    largest = second(first(layers.GlobalMaxPooling2D()(x)))
    gate = layers.Activation("sigmoid")(layers.Add()([average, largest]))
    x = layers.Multiply()([x, layers.Reshape((1, 1, 16))(gate)])
    pooled = [ops.mean(x, axis=-1, keepdims=True), ops.max(x, axis=-1, keepdims=True)]
    place = layers.Conv2D(1, 7, padding="same", activation="sigmoid")(layers.Concatenate()(pooled))
    x = _conv(layers.Multiply()([x, place]), 12)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def siamese() -> Any:
    """Two images through one encoder, compared by distance and by a product."""
    image = keras.Input((8, 8, 3))
    x = layers.MaxPooling2D()(_conv(image, 8))
    x = layers.Dense(10)(layers.Flatten()(_conv(x, 12)))
    encoder = keras.Model(image, x, name="encoder")
    left, right = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
    a, b = encoder(left), encoder(right)
    distance = ops.abs(a - b)
    joined = layers.Concatenate()([distance, layers.Multiply()([a, b])])
    return keras.Model([left, right], layers.Dense(1, activation="sigmoid")(joined))


def cnn_lstm() -> Any:
    """A convolutional net per frame, an LSTM over them."""
    frames = keras.Input((3, 8, 8, 3))
    frame = keras.Input((8, 8, 3))
    x = _conv(frame, 8)
    net = keras.Model(frame, layers.GlobalAveragePooling2D()(_conv(x, 10)), name="frame_net")
    x = layers.TimeDistributed(layers.Conv2D(6, 3, padding="same", activation="relu"))(frames)
    x = layers.TimeDistributed(layers.Conv2D(3, 1))(x)
    x = layers.TimeDistributed(net)(x)
    x = layers.LSTM(9, return_sequences=True)(x)
    x = layers.Bidirectional(layers.LSTM(7))(x)
    return keras.Model(frames, layers.Dense(3)(x))


def wavenet() -> Any:
    """Dilated convolutions with gates, residuals and summed skips."""
    inputs = keras.Input((16, 1))
    x = layers.Conv1D(8, 2, padding="causal")(inputs)
    skips = []
    for dilation in (1, 2, 4):
        wave = layers.Conv1D(12, 2, padding="causal", dilation_rate=dilation, activation="tanh")(x)
        gate = layers.Conv1D(12, 2, padding="causal", dilation_rate=dilation,
                             activation="sigmoid")(x)  # fmt: skip
        y = layers.Multiply()([wave, gate])
        skips.append(layers.Conv1D(10, 1)(y))
        x = layers.Add()([x, layers.Conv1D(8, 1)(y)])
    y = layers.Activation("relu")(layers.Add()(skips))
    y = layers.Conv1D(6, 1, activation="relu")(y)
    return keras.Model(inputs, layers.Conv1D(4, 1, activation="softmax")(y))


def generator() -> Any:
    """Noise to an image: dense, reshape, transposed convolutions."""
    return keras.Sequential([
        keras.Input((5,)),
        layers.Dense(4 * 4 * 12, use_bias=False),
        layers.BatchNormalization(),
        layers.LeakyReLU(),
        layers.Reshape((4, 4, 12)),
        layers.Conv2DTranspose(10, 5, strides=2, padding="same", use_bias=False),
        layers.BatchNormalization(),
        layers.LeakyReLU(),
        layers.UpSampling2D(),
        layers.Conv2D(8, 3, padding="same", activation="relu"),
        layers.Conv2DTranspose(3, 5, padding="same", activation="tanh"),
    ])  # fmt: skip


def densenet_bc() -> Any:
    """Bottlenecks and compressing transitions."""
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same")(x)
    for _ in range(2):
        for _ in range(2):
            y = layers.ReLU()(layers.BatchNormalization()(x))
            y = layers.Conv2D(16, 1, use_bias=False)(y)
            y = layers.ReLU()(layers.BatchNormalization()(y))
            y = layers.Conv2D(4, 3, padding="same", use_bias=False)(y)
            x = layers.Concatenate()([x, y])
        x = layers.Conv2D(x.shape[-1] // 2, 1)(layers.ReLU()(layers.BatchNormalization()(x)))
        x = layers.AveragePooling2D(2)(x)
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def repvgg() -> Any:
    """A 3x3, a 1x1 and an identity branch, each normalised, summed."""
    inputs = keras.Input((8, 8, 3))
    x = _conv(inputs, 12)
    for width in (12, 16):
        branches = [
            layers.BatchNormalization()(layers.Conv2D(width, size, padding="same")(x))
            for size in (3, 1)
        ]
        if x.shape[-1] == width:
            branches.append(layers.BatchNormalization()(x))
        x = layers.ReLU()(layers.Add()(branches))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def mlp_mixer() -> Any:
    """Dense layers over patches and over channels in turn."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Reshape((16, 10))(layers.Conv2D(10, 2, strides=2)(inputs))
    for _ in range(2):
        y = layers.Permute((2, 1))(layers.LayerNormalization()(x))
        y = layers.Dense(16)(layers.Dense(12, activation="gelu")(y))
        x = layers.Add()([x, layers.Permute((2, 1))(y)])
        y = layers.Dense(20, activation="gelu")(layers.LayerNormalization()(x))
        x = layers.Add()([x, layers.Dense(10)(y)])
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(3)(x))


def translator() -> Any:
    """GRU encoder and decoder: the encoder's state starts the decoder, which attends."""
    source, target = keras.Input((6,), dtype="int32"), keras.Input((5,), dtype="int32")
    x = layers.Embedding(20, 8)(source)
    sequence, state = layers.GRU(12, return_sequences=True, return_state=True)(x)
    y = layers.Embedding(20, 8)(target)
    y = layers.GRU(12, return_sequences=True)(y, initial_state=state)
    context = layers.Attention()([y, sequence])
    y = layers.Dense(9, activation="tanh")(layers.Concatenate()([y, context]))
    return keras.Model([source, target], layers.Dense(20)(y))


def tabular() -> Any:
    """Named inputs of several kinds: embedded, normalised and plain ones."""
    inputs = {
        "city": keras.Input((1,), dtype="int32", name="city"),
        "job": keras.Input((1,), dtype="int32", name="job"),
        "numbers": keras.Input((4,), name="numbers"),
        "flag": keras.Input((1,), name="flag"),
    }
    parts = [
        layers.Flatten()(layers.Embedding(9, 4)(inputs["city"])),
        layers.Flatten()(layers.Embedding(9, 3)(inputs["job"])),
        layers.Normalization(mean=[0.0, 1.0, 2.0, 3.0], variance=[1.0, 2.0, 3.0, 4.0])(
            inputs["numbers"]
        ),
        inputs["flag"],
    ]
    x = layers.Concatenate()(parts)
    deep = layers.Dropout(0.1)(layers.Dense(16, activation="relu")(x))
    crossed = layers.Add()([layers.Dense(11)(x), layers.Dense(11, activation="relu")(deep)])
    return keras.Model(inputs, layers.Dense(1, activation="sigmoid")(crossed))
