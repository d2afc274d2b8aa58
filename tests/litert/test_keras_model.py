"""Stable names and static shapes, from either Keras."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tfprune.litert.keras_model import keras_model


def names(model: object) -> tuple[list[str], list[str]]:
    seen = keras_model(model)
    return [port.name for port in seen.inputs], list(seen.output_names)


@pytest.fixture(params=["keras", "tf_keras"])
def keras(request):
    return pytest.importorskip(request.param)


def test_numbered_names_become_plain_ones(keras) -> None:
    for _ in range(2):  # the second time Keras counts on
        x = keras.Input((4,))
        assert names(keras.Model(x, keras.layers.Dense(2)(x))) == (["input"], ["output"])
        model = keras.Sequential(
            [keras.layers.Dense(3, input_shape=(4,))]
            if keras.__name__ == "tf_keras"
            else [keras.Input((4,)), keras.layers.Dense(3)]
        )
        assert names(model) == (["input"], ["output"])


def test_several_numbered_names(keras) -> None:
    a, b = keras.Input((4,)), keras.Input((4,))
    outputs = [
        keras.layers.Dense(2)(a),
        keras.layers.Dense(2, name="mine")(b),
        keras.layers.Add()([a, b]),
    ]
    assert names(keras.Model([a, b], outputs)) == (
        ["input_0", "input_1"],
        ["output_0", "mine", "output_2"],
    )


def test_given_names_are_kept_and_made_identifiers(keras) -> None:
    x = keras.Input((4,), name="pixel-values")
    y = keras.layers.Dense(2, name="head.7")(x)
    assert names(keras.Model(x, y)) == (["pixel_values"], ["head_7"])


def test_names_do_not_collide(keras) -> None:
    a, b = keras.Input((4,), name="a.b"), keras.Input((4,), name="a-b")
    y = keras.layers.Add(name="sum")([a, b])
    assert names(keras.Model([a, b], [y, y])) == (["a_b", "a_b_1"], ["sum", "sum_1"])


def test_dictionary_keys_name_outputs(keras) -> None:
    x = keras.Input((4,))
    outputs = {"boxes": keras.layers.Dense(2)(x), "anchors": keras.layers.Dense(3)(x)}
    assert names(keras.Model(x, outputs))[1] == ["anchors", "boxes"]


def test_nested_model_and_operation_as_output() -> None:
    import keras

    x = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    assert names(keras.Model(x, [inner(x), x + 1])) == (["input"], ["output_0", "output_1"])


def test_importing_the_package_is_light() -> None:
    program = (
        "import sys, tfprune, tfprune.litert; tfprune.export; tfprune.benchmark\n"
        "heavy = {'tensorflow', 'keras', 'tf_keras', 'ai_edge_litert', 'ai_edge_quantizer'}\n"
        "print(heavy & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("set()", "")
