"""A wrapped model computes what the plain one does, and the plain one stays as it was."""

from __future__ import annotations

import copy
import pickle

import keras
import numpy as np
import pytest

import tfprune
from tests.layers.networks import NETWORKS, normal, small
from tests.layers.twins import tfmot
from tfprune.errors import ModelError
from tfprune.graph.trace import node_counts
from tfprune.layers import masks_of, prunable_weights, with_masks
from tfprune.layers.prunable import is_wrapper, walk

layers = keras.layers
HALF = tfprune.schedules.Constant(0.5, 1, frequency=1)


def _require_equal(first, second):
    for a, b in zip(keras.tree.flatten(first), keras.tree.flatten(second), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _snapshot(model):
    """Everything that wrapping must leave alone."""
    everything = [layer for _, layer in walk(model)]
    return (
        [(v.path, v.trainable, np.asarray(v).tolist()) for v in model.variables],
        [layer.name for layer in everything],
        [len(layer._inbound_nodes) for layer in everything],
        node_counts(model),
        model.compiled,
        getattr(model, "optimizer", None),
    )


def _trained(model, inputs, steps=1):
    callback = tfprune.UpdatePruningStep()
    callback.set_model(model)
    callback.on_train_begin()
    for _ in range(steps):
        model(inputs, training=True)
    callback.on_epoch_end(0)
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name, tmp_path) -> None:
    model, inputs = NETWORKS[name]()
    model.compile("sgd", "mse")
    before = _snapshot(model)
    stateful = name == "states"

    def outputs(of):
        if stateful:
            for layer in of.layers:
                inner = layer.layer if is_wrapper(layer) else layer
                if getattr(inner, "stateful", False):
                    inner.reset_states()
        return of(inputs)

    wrapped = tfprune.prune_low_magnitude(model, HALF)
    expected = outputs(model)
    _require_equal(outputs(wrapped), expected)
    assert _snapshot(model) == before
    assert [v.trainable for v in tfprune.strip_pruning(wrapped).variables] == [
        v.trainable for v in model.variables
    ]
    assert not wrapped.compiled

    # after a training call the weights are pruned, in copies of all kinds alike
    _trained(wrapped, inputs)
    masks = masks_of(wrapped)
    assert list(masks) == list(prunable_weights(model))
    for path, mask in masks.items():
        assert np.count_nonzero(mask) == round(mask.size / 2), path  # half to even, as in tfmot
    pruned = outputs(wrapped)
    bare = tfprune.strip_pruning(wrapped)
    _require_equal(outputs(bare), pruned)
    assert bare.name == model.name
    assert [layer.name for _, layer in walk(bare)] == [layer.name for _, layer in walk(model)]
    assert getattr(bare, "output_names", None) == getattr(model, "output_names", None)
    assert _snapshot(model) == before

    again = tfprune.prune_low_magnitude(wrapped, tfmot.ConstantSparsity(0.9, 0))
    _require_equal(outputs(again), pruned)
    assert masks_of(again) == masks
    assert {layer.pruning_schedule for _, layer in walk(again) if is_wrapper(layer)} == {HALF}
    path = tmp_path / "wrapped.keras"
    wrapped.save(path)
    for other in (
        keras.models.load_model(path),
        copy.deepcopy(wrapped),
        pickle.loads(pickle.dumps(wrapped)),
    ):
        assert masks_of(other) == masks
        _require_equal(outputs(other), pruned)


def test_a_network_that_tfmot_refuses() -> None:
    model = keras.applications.EfficientNetB0(weights=None, input_shape=(32, 32, 3), classes=5)
    wrapped = tfprune.prune_low_magnitude(model)
    inputs = normal(2, 32, 32, 3)
    _require_equal(wrapped(inputs), model(inputs))
    import tf_keras

    # of the same kind, which tfmot has not heard of
    with pytest.raises(ValueError, match="Rescaling"):
        tfmot.prune_low_magnitude(
            tf_keras.Sequential([tf_keras.layers.Rescaling(2.0, input_shape=(3,))])
        )


def test_an_unbuilt_sequential_model() -> None:
    model = keras.Sequential([layers.Dense(3), layers.ReLU(), layers.Dense(2)])
    wrapped = tfprune.prune_low_magnitude(model, HALF)
    wrapped.compile("sgd", "mse")
    wrapped.fit(
        normal(8, 4), normal(8, 2), batch_size=4, verbose=0,
        callbacks=[tfprune.UpdatePruningStep()],
    )  # fmt: skip
    assert not model.built
    assert [is_wrapper(layer) for layer in wrapped.layers] == [True, False, True]
    assert [int(np.asarray(wrapped.layers[i].pruning_step)) for i in (0, 2)] == [2, 2]
    assert [round(mask.mean(), 2) for mask in masks_of(wrapped).values()] == [0.5, 0.5]


def test_a_single_layer_is_taken_over() -> None:
    layer = layers.Dense(3, name="one")
    wrapper = tfprune.prune_low_magnitude(layer, HALF, trainable=False)
    assert wrapper.layer is layer and wrapper.name == "prune_low_magnitude_one"
    model = keras.Sequential([keras.Input((4,)), wrapper])
    assert not model.trainable_variables and not layer.trainable
    # without the training argument by name, and with it
    _require_equal(wrapper(normal(2, 4), training=False), layer(normal(2, 4)))


def test_a_list_of_layers() -> None:
    whole = tfprune.prune_low_magnitude(layers.Dense(4))
    given = [layers.Dense(4), layers.ReLU(), layers.BatchNormalization(), whole]
    result = tfprune.prune_low_magnitude(given, HALF)
    assert [is_wrapper(layer) for layer in result] == [True, False, False, True]
    assert result[0].layer is given[0]
    assert result[1:] == given[1:]
    assert keras.Sequential([keras.Input((4,)), *result])(normal(2, 4)).shape == (2, 4)


def test_arguments_of_the_wrappers_reach_them() -> None:
    (wrapper,) = tfprune.prune_low_magnitude([layers.Dense(2)], trainable=False)
    assert not wrapper.trainable and not wrapper.layer.trainable
    # and none is dropped without a word
    for given in (small(), layers.Dense(2), [layers.Dense(2)]):
        with pytest.raises(ValueError, match="nonsense"):
            tfprune.prune_low_magnitude(given, nonsense=1)


def test_numbers_of_numpy_are_whole_numbers() -> None:
    wrapper = tfprune.prune_low_magnitude(
        layers.Dense(2), block_size=(np.int64(2), 1), sparsity_m_by_n=[np.int32(1), 2]
    )
    assert wrapper.get_config()["block_size"] == [2, 1]
    assert type(wrapper.block_size[0]) is int
    assert wrapper.sparsity_m_by_n == (1, 2)


def test_a_function_that_keras_does_not_load() -> None:
    """A lambda; Keras refuses its configuration, which a copy in this process does not need."""
    inputs = keras.Input((4,))
    doubled = layers.Lambda(lambda x, by: x * by, arguments={"by": 2.0}, name="doubled")(inputs)
    model = keras.Model(inputs, layers.Dense(2)(doubled))
    before = _snapshot(model)
    wrapped = tfprune.prune_low_magnitude(model)
    assert wrapped.get_layer("doubled") is not model.get_layer("doubled")
    _require_equal(wrapped(normal(2, 4)), model(normal(2, 4)))
    assert _snapshot(model) == before


class _Own(layers.Layer, tfprune.PrunableLayer):
    """Not registered with Keras."""

    def build(self, shape):
        self.table = self.add_weight(shape=(shape[-1], 4), name="table")

    def call(self, x):
        return keras.ops.matmul(x, self.table)

    def get_prunable_weights(self):
        return [self.table]


class _Unknown(layers.Layer):
    def build(self, shape):
        self.table = self.add_weight(shape=(shape[-1], 4), name="table")

    def call(self, x):
        return keras.ops.matmul(x, self.table)


def test_an_unregistered_layer_and_schedule_are_copied_with_their_wrapper() -> None:
    class Own(tfprune.schedules.Linear):
        pass

    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(2)(_Own(name="own")(inputs)))
    wrapped = _trained(tfprune.prune_low_magnitude(model, Own(0.5, 0.75, 1, 4, 1)), normal(2, 4))
    again = tfprune.prune_low_magnitude(wrapped)
    assert masks_of(again) == masks_of(wrapped) and masks_of(again)["own/table"].mean() == 0.5
    assert int(np.asarray(again.layers[1].pruning_step)) == 1
    assert type(again.layers[1].pruning_schedule) is Own


def test_an_unknown_layer_in_an_unbuilt_model_is_refused_when_it_is_built() -> None:
    wrapped = tfprune.prune_low_magnitude(keras.Sequential([layers.Dense(4), _Unknown(name="odd")]))
    with pytest.raises(ModelError, match=r"_Unknown at 'odd'.*get_prunable_weights"):
        wrapped.build((None, 4))


def test_a_policy_may_spare_an_unknown_layer() -> None:
    class Known(tfprune.PruningPolicy):
        def allow_pruning(self, layer):
            return not isinstance(layer, _Unknown)

        def ensure_model_supports_pruning(self, model):
            pass

    model = keras.Sequential([keras.Input((4,)), _Unknown(), layers.Dense(2, name="head")])
    with pytest.raises(ModelError, match="_Unknown"):
        tfprune.prune_low_magnitude(model)
    assert list(masks_of(tfprune.prune_low_magnitude(model, pruning_policy=Known()))) == [
        "head/kernel"
    ]


def test_a_training_step_of_the_user_is_kept() -> None:
    class Counting(keras.Model):
        def train_step(self, data):
            Counting.calls += 1
            return super().train_step(data)

    class WithConstructor(Counting):
        def __init__(self, units):
            inputs = keras.Input((4,))
            super().__init__(inputs, layers.Dense(units)(inputs))

    Counting.calls = 0
    inputs = keras.Input((4,))
    model = Counting(inputs, layers.Dense(2)(inputs))
    wrapped = tfprune.prune_low_magnitude(model)
    wrapped.compile("sgd", "mse")
    wrapped.fit(normal(2, 4), normal(2, 2), verbose=0, callbacks=[tfprune.UpdatePruningStep()])
    assert Counting.calls == 1
    assert type(tfprune.strip_pruning(wrapped)) is Counting
    # one that cannot be made from inputs and outputs becomes a plain model
    plain = tfprune.prune_low_magnitude(WithConstructor(3))
    assert not isinstance(plain, Counting) and plain(normal(2, 4)).shape == (2, 3)


def test_a_layer_inside_and_outside_a_nested_model_stays_one() -> None:
    everywhere = layers.Dense(4, name="everywhere")
    inside = keras.Input((4,))
    nested = keras.Model(inside, everywhere(inside), name="nested")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, everywhere(nested(inputs)))
    wrapped = tfprune.prune_low_magnitude(model, HALF)
    assert list(prunable_weights(model)) == ["nested/everywhere/kernel"]
    _require_equal(wrapped(normal(2, 4)), model(normal(2, 4)))
    _trained(wrapped, normal(2, 4))
    assert masks_of(wrapped).kept == 8
    _require_equal(tfprune.strip_pruning(wrapped)(normal(2, 4)), wrapped(normal(2, 4)))


def test_models_share_nothing() -> None:
    model = small()
    masks = tfprune.layers.Masks(
        {"hidden/kernel": np.arange(128).reshape(8, 16) % 2, "head/kernel": np.ones((16, 4))}
    )
    first, second = with_masks(model, masks), tfprune.prune_low_magnitude(model)
    assert masks_of(second).sparsity == 0
    assert not {id(v) for v in first.variables} & {id(v) for v in second.variables}
    assert not {id(v) for v in model.variables} & {id(v) for v in second.variables}


def test_a_summary_counts_masks_as_not_trainable() -> None:
    model = small()
    lines: list[str] = []
    wrapped = tfprune.prune_low_magnitude(model)
    wrapped.summary(print_fn=lambda line, **kwargs: lines.append(line))
    assert "prune_low_magnitude" in "".join(lines)
    extra = sum(mask.size for mask in masks_of(wrapped).values()) + 4  # thresholds and steps
    assert wrapped.count_params() == model.count_params() + extra
    assert sum(v.shape.num_elements() for v in map(_tensor, wrapped.trainable_variables)) == (
        model.count_params()
    )


def _tensor(variable):
    return keras.ops.convert_to_tensor(variable)
