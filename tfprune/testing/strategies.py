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


STEPS = (
    _plain, _norm, _depthwise, _separable, _grouped, _residual, _join, _split, _slice, _pad,
    _reshaped, _shuffle, _squeeze_excite, _shared, _nested, _sequential,
)  # fmt: skip
