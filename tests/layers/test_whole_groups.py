"""Grouped convolutions that lose whole groups."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tf_keras

import tfprune
from tests.graph.oracle import assert_masked_equals_pruned
from tests.methods.models import same, snapshot, stir
from tfprune.errors import ModelError
from tfprune.graph.masking import predict_on
from tfprune.layers import with_whole_groups, without_whole_groups
from tfprune.layers.whole_groups import WholeGroupsConv2D
from tfprune.methods import SparseStructureSelection

layers = keras.layers


def resnext(seed=0, groups=8):
    """Two bottlenecks with a grouped convolution on a stream of 12 channels; 2 by 3 per group."""
    keras.utils.set_random_seed(seed)

    def normed(tensor, name):
        return layers.ReLU()(layers.BatchNormalization(name=f"{name}_bn")(tensor))

    inputs = keras.Input((6, 6, 3))
    stream = normed(layers.Conv2D(12, 3, padding="same", name="stem")(inputs), "stem")
    for number in (1, 2):
        branch = normed(layers.Conv2D(16, 1, name=f"reduce{number}")(stream), f"reduce{number}")
        grouped = layers.Conv2D(24, 3, padding="same", groups=groups, name=f"grouped{number}")
        branch = normed(grouped(branch), f"grouped{number}")
        branch = layers.BatchNormalization()(layers.Conv2D(12, 1, name=f"expand{number}")(branch))
        stream = layers.ReLU()(layers.Add(name=f"add{number}")([stream, branch]))
    features = layers.GlobalAveragePooling2D()(stream)
    return stir(keras.Model(inputs, layers.Dense(3, name="head")(features)), seed)


def images(count=4, seed=0):
    """Standard-normal images."""
    return np.random.default_rng(seed).standard_normal((count, 6, 6, 3)).astype("float32")


def test_there_and_back_is_the_same_network() -> None:
    source = resnext()
    whole = with_whole_groups(source)
    assert type(whole.get_layer("grouped1")) is WholeGroupsConv2D
    back = without_whole_groups(whole)
    assert [type(layer) for layer in back.layers] == [type(layer) for layer in source.layers]
    for model in (whole, back):
        np.testing.assert_array_equal(predict_on(model, [images()]), predict_on(source, [images()]))
    before = snapshot(source)
    whole.get_layer("stem").bias.assign(np.ones(12))
    assert same(before, source), "a copy"


def test_masked_equals_pruned() -> None:
    whole = with_whole_groups(resnext())
    small = assert_masked_equals_pruned(whole, {"stem", "reduce1", "reduce2"})
    grouped = small.get_layer("grouped1")
    assert (grouped.groups, grouped.filters) == (4, 12)
    assert tuple(grouped.kernel.shape) == (3, 3, 2, 12)
    plain = without_whole_groups(small)
    np.testing.assert_array_equal(predict_on(plain, [images()]), predict_on(small, [images()]))
    assert type(plain.get_layer("grouped1")) is layers.Conv2D


def test_what_goes_together() -> None:
    graph = tfprune.analyse(with_whole_groups(resnext()))
    group = graph["reduce1"]
    assert group.width == 8
    places = {(m.path, m.weight): np.bincount(m.channels).tolist() for m in group.members}
    assert places["reduce1", "kernel"] == [2] * 8
    for name in (("grouped1", "kernel"), ("grouped1_bn", "gamma"), ("expand1", "kernel")):
        assert places[name] == [3] * 8
    (term,) = [term for term in graph.record.macs if term.path == "grouped1"]
    (outputs,) = term.factors
    assert (term.coefficient, len(outputs)) == (6 * 6 * (3 * 3 * 2), 24)
    # With the same offsets in every group there are two steps, and three behind the convolution.
    within = tfprune.analyse(resnext())
    assert (within["reduce1"].width, within["grouped1"].width) == (2, 3)


def test_the_lowest_groups_go() -> None:
    """One group of the convolution has small filters in front of it, inside and behind."""
    model = resnext()
    for name, axis, size in (("reduce1", 3, 2), ("grouped1", 3, 3), ("expand1", 2, 3)):
        layer = model.get_layer(name)
        kernel = np.asarray(layer.kernel).copy()
        kernel.swapaxes(axis, 0)[5 * size : 6 * size] *= 1e-3
        layer.kernel.assign(kernel)
    plan = tfprune.plan(
        with_whole_groups(model), criterion="l1", pruning_ratio=1 / 8, round_to=1
    )  # fmt: skip
    assert plan.kept["reduce1"] == (0, 1, 2, 3, 4, 6, 7)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_ranks_and_sequential_models(rank) -> None:
    convolution = getattr(layers, f"Conv{rank}D")
    model = keras.Sequential(
        [
            keras.Input((*[4] * rank, 2)),
            convolution(12, 1, name="a"),
            convolution(12, 3, groups=4, name="b"),
            layers.Flatten(),
            layers.Dense(3, name="c"),
        ]
    )
    small = assert_masked_equals_pruned(with_whole_groups(model), {"a"})
    assert isinstance(small, keras.Sequential) and small.get_layer("b").groups == 2


def test_groups_of_what_must_stay_stay() -> None:
    inputs = keras.Input((4, 4, 12))
    x = layers.Conv2D(12, 1, groups=6, name="grouped")(inputs)
    model = keras.Model(inputs, layers.Dense(3, name="last")(layers.Flatten()(x)))
    assert_masked_equals_pruned(with_whole_groups(model), set())


def test_saved_and_loaded(tmp_path) -> None:
    whole = with_whole_groups(resnext())
    whole.save(tmp_path / "whole.keras")
    again = keras.models.load_model(tmp_path / "whole.keras")
    assert tfprune.analyse(again)["reduce1"].width == 8
    assert tfprune.analyse(again).structure == tfprune.analyse(whole).structure


def test_other_models() -> None:
    with pytest.raises(ModelError, match=r"Keras 3 model.*of tf_keras"):
        with_whole_groups(tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(3,))]))


def test_sparse_structure_selection_takes_whole_groups() -> None:
    """Sheet A5, "groups": factors at zero, and the network without them is the trained one."""
    method = SparseStructureSelection(0.3, blocks=False, groups=True, ignore=["stem"])
    data = images(64), np.arange(64) % 3
    result = method.run(
        resnext(), data, epochs=4, learning_rate=0.1, batch_size=16, verbose=0, seed=0
    )
    grouped = result.model.get_layer("grouped1"), result.model.get_layer("grouped2")
    assert all(type(layer) is layers.Conv2D for layer in grouped)
    assert min(layer.groups for layer in grouped) < 8
    assert [layer.filters for layer in grouped] == [3 * layer.groups for layer in grouped]
    # float32: sums without the zeros, in another order
    assert result.difference < 1e-5
