"""Normalisations."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import tf_keras

from tfprune.graph import analyse
from tfprune.surgery import apply

from .oracle import assert_masked_equals_pruned, chain, random_plan

FRAMEWORKS = [keras, tf_keras]


def _model(framework: Any, *middle: Any) -> Any:
    layers = framework.layers
    return chain(
        framework, (6, 6, 2), layers.Conv2D(8, 3, name="a"), *middle,
        layers.Conv2D(6, 3, name="b"), layers.Flatten(), layers.Dense(3),
    )  # fmt: skip


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False, "axis": 3}])
def test_batch_normalisation_is_exact(framework: Any, options: dict[str, Any]) -> None:
    model = _model(framework, framework.layers.BatchNormalization(name="bn", **options))
    small = assert_masked_equals_pruned(model, {"a", "b"})
    assert analyse(model)["a"].exact
    assert tuple(small.get_layer("bn").moving_variance.shape) == (4,)


def test_renormalisation_of_tf_keras() -> None:
    model = _model(tf_keras, tf_keras.layers.BatchNormalization(renorm=True))
    assert_masked_equals_pruned(model, {"a", "b"})


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": False}, {"center": False}, {"axis": [1, 2, 3]}, {"axis": 1}],
)
def test_layer_normalisation(framework: Any, options: dict[str, Any]) -> None:
    model = _model(framework, framework.layers.LayerNormalization(**options))
    assert_masked_equals_pruned(model, {"a", "b"})
    # Statistics across rows only do not change with the channels.
    assert analyse(model)["a"].exact is (options.get("axis") == 1)


@pytest.mark.parametrize("options", [{}, {"axis": (1, 2, 3)}])
def test_root_mean_square_normalisation(options: dict[str, Any]) -> None:
    model = _model(keras, keras.layers.RMSNormalization(**options))
    assert_masked_equals_pruned(model, {"a", "b"})
    assert "RMS normalisation" in analyse(model)["a"].inexact_reason


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_unit_normalisation(framework: Any) -> None:
    model = _model(framework, framework.layers.UnitNormalization(axis=-1))
    assert_masked_equals_pruned(model, {"a", "b"})


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize(("groups", "exact"), [(1, False), (2, False), (8, True), (-1, True)])
def test_group_normalisation(framework: Any, groups: int, exact: bool) -> None:
    model = _model(framework, framework.layers.GroupNormalization(groups, name="gn"))
    small = assert_masked_equals_pruned(model, {"a", "b"})
    assert analyse(model)["a"].exact is exact
    assert small.get_layer("gn").groups == (4 if groups in (8, -1) else groups)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("middle", [True, False])
@pytest.mark.parametrize("invert", [True, False])
def test_adapted_normalisation(framework: Any, middle: bool, invert: bool) -> None:
    layers = framework.layers
    normalisation = layers.Normalization(invert=invert, name="norm")
    dense = layers.Dense(8, name="a")
    order = [dense, normalisation] if middle else [normalisation, dense]
    model = chain(framework, (5, 6), *order, layers.Dense(3))
    random = np.random.default_rng(0)
    normalisation.adapt(random.normal(2.0, 3.0, (50, 5, 8 if middle else 6)).astype("float32"))
    small = assert_masked_equals_pruned(model, {"a"}, random_weights=False)
    assert small.get_layer("norm").adapt_mean.shape == ((4,) if middle else (6,))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_normalisation_computes_as_its_source_does(framework: Any) -> None:
    layers = framework.layers
    model = chain(
        framework, (6,), layers.Normalization(name="norm"), layers.Dense(8, name="a"),
        layers.Dense(3),
    )  # fmt: skip
    # Assigned, not adapted: the layer goes on with the statistics that it has made before.
    model.get_layer("norm").adapt_variance.assign([4.0] * 6)
    assert_masked_equals_pruned(model, {"a"}, random_weights=False)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("axis", [-1, (1, -1), None])
def test_given_statistics_of_normalisation_are_cut(framework: Any, axis: Any) -> None:
    layers = framework.layers
    shape = {-1: (8,), (1, -1): (5, 8), None: ()}[axis]
    random = np.random.default_rng(0)
    mean, variance = random.normal(size=shape), random.uniform(0.5, 1.5, shape)
    model = chain(
        framework, (5, 6), layers.Dense(8, name="a"),
        layers.Normalization(axis, mean=mean, variance=variance), layers.Dense(3),
    )  # fmt: skip
    assert_masked_equals_pruned(model, {"a"})


def test_normalisation_over_rows_freezes_what_it_shares() -> None:
    layers = keras.layers
    model = chain(
        keras, (6, 8), layers.Dense(8, name="a"), layers.Permute((2, 1)),
        layers.GroupNormalization(2), layers.Flatten(), layers.Dense(3),
    )  # fmt: skip
    assert_masked_equals_pruned(model, set())


def test_normalised_layers_keep_their_names_and_flags() -> None:
    model = _model(keras, keras.layers.BatchNormalization(name="bn", momentum=0.9))
    model.get_layer("bn").trainable = False
    small = apply(model, random_plan(model))
    assert small.get_layer("bn").momentum == 0.9
    assert not small.get_layer("bn").trainable
    assert small.get_layer("a").trainable
