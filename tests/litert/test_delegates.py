"""What the delegates would take, from the file alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tfprune.errors import ModelError
from tfprune.litert.convert import convert
from tfprune.litert.delegates import cpu_delegation, gpu_audit
from tfprune.litert.flatbuffer import read_graph
from tfprune.litert.keras_model import keras_model


def converted(head: Callable[[Any, Any], Any], dtype: str = "float32") -> bytes:
    import keras

    x = keras.Input((8, 8, 4) if dtype == "float32" else (6,), dtype=dtype)
    y = keras.layers.ReLU()(keras.layers.Conv2D(8, 3)(x)) if dtype == "float32" else x
    return convert(keras_model(keras.Model(x, head(keras, y))))


def shuffle(keras: Any, x: Any) -> Any:
    x = keras.layers.Reshape((6, 6, 2, 4))(x)
    return keras.layers.Reshape((6, 6, 8))(keras.layers.Permute((1, 2, 4, 3))(x))


def test_plain_network(keras3_toy) -> None:
    content = convert(keras_model(keras3_toy))
    audit = gpu_audit(read_graph(content))
    assert audit.clear and audit.undocumented == ()
    delegation = cpu_delegation(content)
    assert delegation.taken["CONV_2D"] == 3
    assert (delegation.left, delegation.partitions) == ({}, 1)


def test_operations_that_xnnpack_leaves() -> None:
    content = converted(lambda keras, x: keras.layers.UpSampling2D()(x))
    delegation = cpu_delegation(content)
    # nearest upsampling is lowered to RESHAPE and TILE, and TILE cuts the graph in parts
    assert delegation.left == {"TILE": 2}
    assert delegation.partitions == 3
    assert "not 2 TILE" in str(delegation)


@pytest.mark.parametrize(
    ("head", "op", "reason"),
    [
        (shuffle, "TRANSPOSE", "more than 4 axes"),
        (lambda keras, x: keras.layers.GroupNormalization(2)(x), "MEAN", "more than 4 axes"),
        (
            lambda keras, x: keras.layers.LSTM(3)(keras.layers.Reshape((36, 8))(x)),
            "WHILE",
            "no GPU delegate has it",
        ),
        (lambda keras, x: x[:, 0], "STRIDED_SLICE", "drops an axis"),
    ],
)
def test_obstacles_for_the_gpu(head, op, reason) -> None:
    audit = gpu_audit(read_graph(converted(head)))
    assert not audit.clear
    assert any(o.op == op and reason in o.reason for o in audit.obstacles)
    assert reason in str(audit)


def test_embeddings_are_an_obstacle() -> None:
    audit = gpu_audit(
        read_graph(converted(lambda keras, x: keras.layers.Embedding(9, 4)(x), "int32"))
    )
    assert "GATHER" in {obstacle.op for obstacle in audit.obstacles}


def test_open_batch_is_an_obstacle() -> None:
    import keras
    import tensorflow as tf

    x = keras.Input((8, 8, 2))
    model = keras.Model(x, keras.layers.Dense(3)(keras.layers.Flatten()(x)))
    function = tf.function(model).get_concrete_function(tf.TensorSpec((None, 8, 8, 2)))
    holder = tf.Module()
    holder.kept = [variable.value for variable in model.variables]
    content = tf.lite.TFLiteConverter.from_concrete_functions([function], holder).convert()
    found = {
        (obstacle.op, obstacle.reason) for obstacle in gpu_audit(read_graph(content)).obstacles
    }
    assert ("SHAPE", "no GPU delegate has it; it comes with an open batch size") in found
    assert ("RESHAPE", "a tensor whose size is known at run time only") in found


@pytest.mark.parametrize(
    ("head", "hazard"),
    [
        (
            lambda keras, x: keras.layers.Concatenate()(keras.ops.split(x, 2, axis=-1)[::-1]),
            "another order",
        ),
        (lambda keras, x: keras.layers.Concatenate()(keras.ops.split(x, 2, axis=1)), None),
        (
            lambda keras, x: keras.layers.Attention()([keras.layers.Reshape((36, 8))(x)] * 2),
            "both factors",
        ),
    ],
)
def test_hazards(head, hazard) -> None:
    audit = gpu_audit(read_graph(converted(head)))
    assert audit.obstacles == ()
    assert [h.reason for h in audit.hazards if hazard and hazard in h.reason] == [
        h.reason for h in audit.hazards
    ]
    assert len(audit.hazards) == (hazard is not None)
    assert audit.clear == (hazard is None)


def test_what_is_no_litert_model() -> None:
    for content in (b"", b"PK\x03\x04 a zip", np.zeros(100, "uint8").tobytes()):
        with pytest.raises(ModelError, match="Expected a LiteRT model"):
            read_graph(content)
