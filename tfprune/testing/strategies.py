"""Functional models made by hypothesis: branches, sums, splits, reshapes, shared, nested parts."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

WIDTHS = st.integers(2, 9)


def draw_model(draw: Any, max_ops: int = 9) -> Any:
    """A Keras 3 model over 8x8 feature maps with random structure and random weights.

    It has one or two image inputs and two or three outputs behind dense layers. To be called from
    the test itself, not from a strategy, as Keras draws random numbers of its own::

        @given(data=st.data())
        def test(data):
            model = draw_model(data.draw)

    Args:
        draw: ``data.draw`` of hypothesis.
        max_ops: at most so many building blocks.
    """
    import keras

    from tfprune.testing.models import randomize

    seed = draw(st.integers(0, 2**16))
    keras.utils.set_random_seed(seed)
    inputs = [keras.Input((8, 8, draw(st.integers(1, 3)))) for _ in range(draw(st.integers(1, 2)))]
    maps = [_conv(draw, x) for x in inputs]
    for _ in range(draw(st.integers(1, max_ops))):
        source = draw(st.integers(0, len(maps) - 1))
        step = draw(st.sampled_from(STEPS))
        maps.append(step(draw, maps[source], maps))
    heads = []
    for _ in range(draw(st.integers(1, 2))):
        heads.append(_head(draw, maps[draw(st.integers(0, len(maps) - 1))]))
    # Everything that was made is used, so that the model has no dead ends.
    heads.append(_head(draw, keras.layers.Concatenate()([_pooled(x) for x in maps]), dense=True))
    return randomize(keras.Model(inputs, heads), seed)


def _pooled(x: Any) -> Any:
    import keras

    return keras.layers.GlobalAveragePooling2D()(x)


def _head(draw: Any, x: Any, dense: bool = False) -> Any:
    import keras

    if not dense:
        flat = draw(st.booleans())
        x = keras.layers.Flatten()(x) if flat else _pooled(x)
    x = keras.layers.Dense(draw(WIDTHS), activation=draw(st.sampled_from(["relu", "tanh"])))(x)
    return keras.layers.Dense(3)(x)


def _conv(draw: Any, x: Any, width: int | None = None) -> Any:
    import keras

    layer = keras.layers.Conv2D(
        width or draw(WIDTHS),
        draw(st.sampled_from([1, 3])),
        padding="same",
        use_bias=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "relu"])),
    )
    return layer(x)


def _norm(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    kind = draw(st.sampled_from(["batch", "layer", "prelu"]))
    if kind == "batch":
        return keras.layers.BatchNormalization(center=draw(st.booleans()))(x)
    if kind == "layer":
        return keras.layers.LayerNormalization()(x)
    return keras.layers.PReLU(shared_axes=[1, 2])(x)


def _plain(draw: Any, x: Any, maps: list[Any]) -> Any:
    return _conv(draw, x)


def _depthwise(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    return keras.layers.DepthwiseConv2D(
        3, padding="same", depth_multiplier=draw(st.integers(1, 2))
    )(x)


def _separable(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    return keras.layers.SeparableConv2D(draw(WIDTHS), 3, padding="same")(x)


def _grouped(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    y = _conv(draw, x, 6)
    return keras.layers.Conv2D(draw(st.sampled_from([6, 12])), 3, padding="same",
                               groups=draw(st.sampled_from([2, 3, 6])))(y)  # fmt: skip


def _residual(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    y = _conv(draw, _conv(draw, x), x.shape[-1])
    kind = draw(st.sampled_from(["layer", "operator", "multiply", "average", "maximum"]))
    if kind == "operator":
        return x + y
    layers = {
        "layer": keras.layers.Add,
        "multiply": keras.layers.Multiply,
        "average": keras.layers.Average,
        "maximum": keras.layers.Maximum,
    }
    return layers[kind]()([x, y])


def _join(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    other = maps[draw(st.integers(0, len(maps) - 1))]
    if draw(st.booleans()):
        return keras.layers.Concatenate()([x, other])
    return keras.ops.concatenate([other, x, x], axis=-1)


def _split(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    y = _conv(draw, x, 2 * draw(st.integers(2, 4)))
    first, second = keras.ops.split(y, 2, axis=-1)
    if draw(st.booleans()):
        return first * keras.ops.sigmoid(second)
    return keras.ops.concatenate([second, first], axis=-1)


def _slice(draw: Any, x: Any, maps: list[Any]) -> Any:
    width = x.shape[-1]
    start = draw(st.integers(0, width - 1))
    stop = draw(st.integers(start + 1, width))
    return x[..., start:stop]


def _pad(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    before, after = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    y = keras.ops.pad(x, [[0, 0], [0, 0], [0, 0], [before, after]])
    return y + _conv(draw, x, int(y.shape[-1]))


def _reshaped(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    width = x.shape[-1]
    y = keras.layers.Reshape((64, width))(x)
    if draw(st.booleans()):
        y = keras.layers.Permute((2, 1))(y)
        y = keras.ops.tanh(y)
        y = keras.layers.Permute((2, 1))(y)
    y = keras.layers.Dense(draw(WIDTHS))(y)
    return keras.ops.reshape(y, (-1, 8, 8, y.shape[-1]))


def _shuffle(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    y = _conv(draw, x, 2 * draw(st.integers(1, 4)))
    half = y.shape[-1] // 2
    y = keras.layers.Reshape((8, 8, 2, half))(y)
    y = keras.layers.Permute((1, 2, 4, 3))(y)
    return keras.layers.Reshape((8, 8, 2 * half))(y)


def _squeeze_excite(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    width = x.shape[-1]
    gate = keras.layers.GlobalAveragePooling2D(keepdims=draw(st.booleans()))(x)
    gate = keras.layers.Reshape((1, 1, width))(gate)
    gate = keras.layers.Dense(draw(WIDTHS), activation="relu")(gate)
    gate = keras.layers.Conv2D(width, 1, activation="sigmoid")(gate)
    return x * gate


def _shared(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    width = x.shape[-1]
    layer = keras.layers.Conv2D(width, 3, padding="same")
    return keras.layers.Concatenate()([layer(x), layer(layer(x))])


def _nested(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    inner_input = keras.Input(x.shape[1:])
    y = _conv(draw, inner_input)
    y = keras.layers.BatchNormalization()(y)
    inner = keras.Model(inner_input, [y, _conv(draw, y)])
    first, second = inner(x)
    if draw(st.booleans()):
        third, _ = inner(keras.ops.tanh(x))
        return keras.layers.Concatenate()([first, second, third])
    return keras.layers.Concatenate()([first, second])


def _sequential(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    inner = keras.Sequential([
        keras.layers.Conv2D(draw(WIDTHS), 3, padding="same"),
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
    ])  # fmt: skip
    return inner(x)


def _transposed(draw: Any, x: Any, maps: list[Any]) -> Any:
    """Up by a transposed convolution or repetition, down again by pooling or a stride."""
    import keras

    if draw(st.booleans()):
        y = keras.layers.Conv2DTranspose(draw(WIDTHS), 3, strides=2, padding="same")(x)
    else:
        y = keras.layers.UpSampling2D(interpolation=draw(st.sampled_from(["nearest", "bilinear"])))(
            x
        )
    if draw(st.booleans()):
        return keras.layers.MaxPooling2D(2)(y)
    return y[:, ::2, 1::2]


def _padded(draw: Any, x: Any, maps: list[Any]) -> Any:
    """Space grows and shrinks."""
    import keras

    y = keras.layers.ZeroPadding2D(((1, 0), (0, 2)))(x)
    if draw(st.booleans()):
        return keras.layers.Cropping2D(((0, 1), (2, 0)))(y)
    return keras.layers.AveragePooling2D((2, 3), strides=1)(y)


def _group_norm(draw: Any, x: Any, maps: list[Any]) -> Any:
    import keras

    return keras.layers.GroupNormalization(draw(st.sampled_from([1, 2, 3, 6])))(_conv(draw, x, 6))


def _attended(draw: Any, x: Any, maps: list[Any]) -> Any:
    """Pixels of a smaller map attend to each other, or to those of another map."""
    import keras

    def sequence(y: Any) -> Any:
        return keras.layers.Reshape((16, y.shape[-1]))(keras.layers.MaxPooling2D(2)(y))

    other = maps[draw(st.integers(0, len(maps) - 1))]
    y = keras.layers.MultiHeadAttention(
        draw(st.integers(1, 3)), draw(st.integers(1, 4)), value_dim=draw(st.integers(1, 4))
    )(sequence(x), sequence(other))
    return keras.layers.UpSampling2D()(keras.layers.Reshape((4, 4, y.shape[-1]))(y))


def _recurrent(draw: Any, x: Any, maps: list[Any]) -> Any:
    """Rows of pixels as a sequence."""
    import keras

    kind = draw(st.sampled_from([keras.layers.LSTM, keras.layers.GRU, keras.layers.SimpleRNN]))
    layer = kind(draw(st.integers(2, 5)), return_sequences=True)
    if draw(st.booleans()):
        layer = keras.layers.Bidirectional(
            layer, merge_mode=draw(st.sampled_from(["concat", "sum", "mul"]))
        )
    y = layer(keras.ops.reshape(x, (-1, 64, x.shape[-1])))
    return keras.layers.Reshape((8, 8, y.shape[-1]))(y)


def _arithmetic(draw: Any, x: Any, maps: list[Any]) -> Any:
    """Three operands, the same one twice, constants per channel or for all."""
    import keras
    import numpy as np

    width = x.shape[-1]
    kind = draw(st.sampled_from(["three", "twice", "scale", "constant", "difference"]))
    if kind == "three":
        return keras.layers.Maximum()([x, _conv(draw, x, width), _conv(draw, x, width)])
    if kind == "twice":
        return x + x
    if kind == "scale":
        return 0.5 * x - 1.0
    if kind == "constant":
        return x * np.linspace(-1, 1, width).astype("float32")
    return keras.ops.square(x - _conv(draw, x, width))


def _dense(draw: Any, x: Any, maps: list[Any]) -> Any:
    """A dense layer on the channels, or on the columns with channels behind."""
    import keras

    if draw(st.booleans()):
        return keras.layers.Dense(draw(WIDTHS), activation="tanh")(x)
    y = keras.layers.Permute((1, 3, 2))(x)
    return keras.layers.Permute((1, 3, 2))(keras.layers.Dense(8)(y))


def _channels_first(draw: Any, x: Any, maps: list[Any]) -> Any:
    """An island with the channels in front."""
    import keras

    y = keras.layers.Permute((3, 1, 2))(x)
    y = keras.layers.BatchNormalization(axis=1)(y)
    y = keras.layers.PReLU(shared_axes=[2, 3])(y)
    if draw(st.booleans()):
        y = keras.ops.concatenate([y, keras.ops.flip(y, axis=1)], axis=1)
    return keras.ops.transpose(y, (0, 2, 3, 1))


def _statistics(draw: Any, x: Any, maps: list[Any]) -> Any:
    """Statistics over the channels as a gate."""
    import keras

    reduce = draw(st.sampled_from([keras.ops.mean, keras.ops.max, keras.ops.std]))
    gate = keras.layers.Conv2D(1, 3, padding="same")(reduce(x, axis=-1, keepdims=True))
    return x * keras.ops.sigmoid(gate)


def _deeply_nested(draw: Any, x: Any, maps: list[Any]) -> Any:
    """A model in a model, called on two tensors."""
    import keras

    shape = x.shape[1:]
    innermost_input = keras.Input(shape)
    innermost = keras.Model(innermost_input, _conv(draw, _conv(draw, innermost_input), shape[-1]))
    first, second = keras.Input(shape), keras.Input(shape)
    middle = keras.Model(
        [first, second],
        {"sum": innermost(first) + second, "rest": _conv(draw, innermost(second))},
    )
    outputs = middle([x, _conv(draw, x, shape[-1])])
    if draw(st.booleans()):
        more = middle([outputs["sum"], x])
        return keras.layers.Concatenate()([outputs["rest"], more["sum"], more["rest"]])
    return keras.layers.Concatenate()([outputs["sum"], outputs["rest"]])


def _over_time(draw: Any, x: Any, maps: list[Any]) -> Any:
    """Rows as time steps of a wrapped layer."""
    import keras

    return keras.layers.TimeDistributed(
        keras.layers.Conv1D(draw(WIDTHS), 3, padding="same", activation="relu")
    )(x)


STEPS = (
    _plain, _norm, _depthwise, _separable, _grouped, _residual, _join, _split, _slice, _pad,
    _reshaped, _shuffle, _squeeze_excite, _shared, _nested, _sequential, _transposed, _padded,
    _group_norm, _attended, _recurrent, _arithmetic, _dense, _channels_first, _statistics,
    _deeply_nested, _over_time,
)  # fmt: skip
