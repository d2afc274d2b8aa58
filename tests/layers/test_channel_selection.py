"""Channel selection: readers of a shared stream drop channels by themselves."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import tfprune
from tests.methods.models import stir
from tfprune.errors import ModelError
from tfprune.graph.masking import predict_on
from tfprune.layers.channel_selection import (
    ChannelSelection,
    with_selections,
    without_selections,
)
from tfprune.methods import NetworkSlimming


def preactivation(seed=0, axis=-1):
    """Two pre-activation bottlenecks on a stream of 8 channels."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers

    def before(tensor, name):
        tensor = layers.BatchNormalization(axis=axis, name=f"{name}_bn")(tensor)
        return layers.ReLU(name=f"{name}_relu")(tensor)

    inputs = keras.Input((6, 6, 3))
    stream = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(inputs)
    for number in (1, 2):
        branch = before(stream, f"in{number}")
        branch = layers.Conv2D(4, 1, use_bias=False, name=f"reduce{number}")(branch)
        branch = before(branch, f"inner{number}")
        branch = layers.Conv2D(8, 3, padding="same", use_bias=False, name=f"expand{number}")(branch)
        stream = layers.Add(name=f"add{number}")([stream, branch])
    features = layers.GlobalAveragePooling2D()(before(stream, "last"))
    return stir(keras.Model(inputs, layers.Dense(3, name="head")(features)), seed)


def dense_block(seed=0):
    """Three layers of growth 4, each reading all before it."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    inputs = keras.Input((6, 6, 3))
    known = layers.Conv2D(6, 3, padding="same", name="stem")(inputs)
    for number in (1, 2, 3):
        new = layers.BatchNormalization(name=f"bn{number}")(known)
        new = layers.Conv2D(4, 3, padding="same", name=f"grow{number}")(layers.ReLU()(new))
        known = layers.Concatenate(name=f"join{number}")([known, new])
    features = layers.BatchNormalization(name="bn4")(known)
    features = layers.GlobalAveragePooling2D()(layers.ReLU()(features))
    return stir(keras.Model(inputs, layers.Dense(3, name="head")(features)), seed)


NETWORKS = {"preactivation": preactivation, "dense block": dense_block}


def images(count=4, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 6, 6, 3)).astype("float32")


def outputs(model):
    return np.asarray(predict_on(model, [images()])[0])


def named(model):
    return [layer.name for layer in model.layers if isinstance(layer, ChannelSelection)]


def test_where_selections_go() -> None:
    """Before what reads a stream; a batch normalisation right behind its convolution needs none."""
    assert named(with_selections(preactivation())) == [
        "select_for_in1_bn",
        "select_for_in2_bn",
        "select_for_last_bn",
    ]
    assert named(with_selections(dense_block())) == [
        f"select_for_bn{number}" for number in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_whole_selection_changes_nothing(name) -> None:
    source = NETWORKS[name]()
    selected = with_selections(source)
    np.testing.assert_array_equal(outputs(selected), outputs(source))
    back = without_selections(selected)
    np.testing.assert_array_equal(outputs(back), outputs(source))
    assert [layer.name for layer in back.layers] == [layer.name for layer in source.layers]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_masked_equals_pruned_equals_gathered(name, seed) -> None:
    """Readers and streams both lose channels; the stream's own group is cut by a ratio."""
    selected = with_selections(NETWORKS[name](seed))
    plan = tfprune.plan(selected, 0.5, criterion=tfprune.criteria.Random(seed), round_to=1)
    groups = {name for name in plan.kept if name.startswith("select_for")}
    assert groups and set(plan.kept) - groups
    assert tfprune.verify(selected, plan).passed
    smaller = plan.apply(selected)
    gathered = without_selections(smaller)
    # the same numbers are read: a product with 1 and sums with zeros are exact
    np.testing.assert_array_equal(outputs(gathered), outputs(smaller))
    assert not named(gathered)


def test_a_reader_drops_what_another_keeps() -> None:
    method = NetworkSlimming(selection=True, pruning_ratio=0.25)
    source = preactivation()
    for number, gamma in (("1", [0.01] * 4 + [1.0] * 4), ("2", [1.0] * 4 + [0.01] * 4)):
        source.get_layer(f"in{number}_bn").gamma.assign(gamma)
    for layer in ("inner1_bn", "inner2_bn", "last_bn"):
        gamma = source.get_layer(layer).gamma
        gamma.assign(np.ones(gamma.shape))
    model = method.prepare(source)
    plan = method.plan(model)
    # 3 x 8 read, 2 x 4 inner: floor(32 / 4) = 8 go, the small ones
    assert plan.kept == {
        "select_for_in1_bn": (4, 5, 6, 7),
        "select_for_in2_bn": (0, 1, 2, 3),
    }
    finished = method.finish(model)
    assert finished.get_layer("stem").filters == 8
    assert finished.get_layer("reduce1").kernel.shape == (1, 1, 4, 4)
    again = tfprune.analyse(finished)  # an ordinary model that can be pruned further
    assert again.prunable


def test_it_survives_saving(tmp_path) -> None:
    model = NetworkSlimming(selection=True).prepare(preactivation())
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(outputs(loaded), outputs(model))
    finished = NetworkSlimming(selection=True, pruning_ratio=0.5).finish(loaded)
    finished.save(tmp_path / "finished.keras")
    np.testing.assert_array_equal(
        outputs(keras.models.load_model(tmp_path / "finished.keras")), outputs(finished)
    )


def test_channels_first_is_refused() -> None:
    with pytest.raises(ModelError, match="channels last"):
        with_selections(preactivation(axis=1))
    sequential = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    assert with_selections(sequential) is sequential
