"""What holds for all methods: purity, held masks, finishing, running, resuming."""

from __future__ import annotations

import doctest
from dataclasses import FrozenInstanceError, fields
from itertools import pairwise

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfprune.methods
from tests.methods.models import mlp, rows, same, snapshot
from tests.toys import images, labels, residual
from tfprune.data import load
from tfprune.errors import ArgumentError, ModelError
from tfprune.layers import Masks, UpdatePruningStep, masks_of, prunable_weights, with_masks
from tfprune.methods import (
    DSD,
    SNIP,
    GlobalMagnitude,
    GraSP,
    Han,
    MagnitudePruning,
    MethodResult,
    RandomPruning,
    SynFlow,
)
from tfprune.protocols import fine_tune
from tfprune.schedules import ConstantSparsity
from tfprune.zoo import digits_resnet

IMAGES = images(), labels()
METHODS = {
    "magnitude": MagnitudePruning(ConstantSparsity(0.5, 0, frequency=1)),
    "han": Han(quality=[0.3, 0.5]),
    "global": GlobalMagnitude(0.4, dense=True, rounds=2),
    "dsd": DSD(0.5, dense_epochs=1),
    "random": RandomPruning(0.5),
    "snip": SNIP(0.4, IMAGES),
    "grasp": GraSP(0.4, IMAGES),
    "synflow": SynFlow(0.5, iterations=5),
}


@pytest.mark.parametrize("name", METHODS)
def test_preparing_leaves_the_model_as_it_was(name) -> None:
    model = residual()
    before, layers = snapshot(model), list(model.layers)
    outputs = model(IMAGES[0], training=False)

    prepared = METHODS[name].prepare(model)

    assert prepared is not model
    assert same(before, model)
    assert model.layers == layers
    np.testing.assert_array_equal(model(IMAGES[0], training=False), outputs)
    # Nothing but masked weights differs in the copy.
    kept = masks_of(prepared)
    for path, variable in prunable_weights(prepared).items():
        original = np.asarray(prunable_weights(model)[path])
        np.testing.assert_array_equal(np.asarray(variable), np.where(kept[path], original, 0))


def test_masks_are_held_while_everything_else_learns() -> None:
    model, method = residual(), RandomPruning(0.5)
    masks = method.masks(model)

    result = method.run(model, IMAGES, epochs=2, batch_size=6, verbose=0, learning_rate=0.05)

    assert isinstance(result, MethodResult)
    assert Masks.of_zeros(result.model) == masks
    assert result.sparsity == masks.sparsity
    assert result.record.epochs == 2
    for path, variable in prunable_weights(result.model).items():
        moved = np.asarray(variable) != np.asarray(prunable_weights(model)[path])
        assert (moved & masks[path]).any(), path


def test_gradual_pruning_ends_at_its_schedule() -> None:
    model = mlp(widths=(20, 10))
    result = METHODS["magnitude"].run(model, rows(), epochs=1, verbose=0)

    zeros = Masks.of_zeros(result.model)
    # 140, 200 and 30 weights, half of each, as tfmot counts
    assert {path: int(mask.sum()) for path, mask in zeros.items()} == {
        "fc1/kernel": 70,
        "fc2/kernel": 100,
        "head/kernel": 15,
    }
    assert result.sparsity == 0.5


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_values(name) -> None:
    method = METHODS[name]
    with pytest.raises(FrozenInstanceError):
        setattr(method, fields(method)[0].name, None)
    first, second = method.callbacks(), method.callbacks()
    assert sum(isinstance(callback, UpdatePruningStep) for callback in first) == 1
    assert not {id(callback) for callback in first} & {id(callback) for callback in second}


@pytest.mark.parametrize("name", METHODS)
def test_tf_keras_models_are_sent_to_tfmot(name) -> None:
    import tf_keras

    model = tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(3,))])

    with pytest.raises(ModelError, match="tensorflow_model_optimization"):
        METHODS[name].prepare(model)


@pytest.mark.parametrize("name", METHODS)
def test_unbuilt_models_are_refused(name) -> None:
    with pytest.raises(ModelError, match="build"):
        METHODS[name].prepare(keras.Sequential([keras.layers.Dense(2)]))


def _several_inputs():
    """Named inputs, a layer called twice, a nested model, a function, operations."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    inputs = {name: keras.Input((4,), name=name) for name in ("left", "right")}
    shared = layers.Dense(5, "relu", name="shared")
    nested = keras.Sequential(
        [keras.Input((5,)), layers.Dense(6, "swish", name="inner"), layers.BatchNormalization()],
        name="nested",
    )
    x = layers.Add()([nested(shared(tensor)) for tensor in inputs.values()])
    x = keras.ops.silu(layers.Lambda(lambda tensor: tensor * 2.0)(x)) + 1.0
    return keras.Model(inputs, layers.Dense(3, "softmax", name="head")(x))


def test_models_of_every_form_can_be_scored_and_trained() -> None:
    model, random = _several_inputs(), np.random.default_rng(0)
    x = {name: random.random((9, 4)).astype("float32") for name in ("left", "right")}
    data = x, np.arange(9) % 3
    count = 4 * 5 + 5 * 6 + 6 * 3
    for method in (SNIP(0.3, data), GraSP(0.3, data), SynFlow(0.3)):
        masks = method.masks(model)
        assert list(masks) == ["shared/kernel", "nested/inner/kernel", "head/kernel"]
        assert masks.kept == round(count * 0.7)
    result = SNIP(0.3, data).run(model, data, epochs=1, verbose=0)
    assert result.sparsity == (count - round(count * 0.7)) / count


def test_scores_do_not_depend_on_half_precision() -> None:
    model, data = mlp(), rows()
    mixed = keras.models.clone_model(
        model,
        clone_function=lambda layer: type(layer).from_config(
            {**layer.get_config(), "dtype": "mixed_float16"}
        ),
    )
    mixed.set_weights(model.get_weights())
    assert mixed.layers[0].compute_dtype == "float16"
    for method in (SNIP(0.5, data), GraSP(0.5, data), SynFlow(0.5)):
        expected, scores = method.scores(model), method.scores(mixed)
        for path in expected:
            np.testing.assert_array_equal(scores[path], expected[path])


def test_the_digits_end_at_the_sparsity_that_was_asked() -> None:
    data = load("digits", subset=256, seed=0)
    model = digits_resnet(8, widths=(8, 8, 16), seed=0)
    method = SNIP(0.8, data.train)

    result = method.run(model, data.train, data.validation, epochs=6, learning_rate=0.1, verbose=0)

    zeros = [np.asarray(v) == 0 for v in prunable_weights(result.model).values()]
    count = sum(z.size for z in zeros)
    assert sum(int(z.sum()) for z in zeros) == count - round(count * 0.2)
    assert result.sparsity == (count - round(count * 0.2)) / count
    # An ordinary model: layers of Keras, and as many weights as before.
    assert [type(layer) for layer in result.model.layers] == [type(x) for x in model.layers]
    assert result.model.count_params() == model.count_params()
    assert {layer.name for layer in result.model.layers} == {x.name for x in model.layers}
    # It has learnt: chance is ln 10 = 2.3.
    assert result.record.history["loss"][-1] < 1.5
    assert result.record.best_epoch is not None


def test_rounds_start_where_they_should_and_only_take() -> None:
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 0:
                seen.append(masks_of(self.model))

    method = Han(quality=[0.3, 0.5, 0.9], epochs_per_round=2)
    method.run(
        mlp(widths=(30, 20)), rows(), epochs=6, learning_rate=0.05, verbose=0, callbacks=[Watch()]
    )

    assert [a == b for a, b in pairwise(seen)] == [True, False] * 2 + [True]
    assert all(later & earlier == later for earlier, later in pairwise(seen))


@pytest.mark.parametrize(
    "method", [Han(quality=[0.3, 0.5, 0.9]), GlobalMagnitude(0.7, dense=True, rounds=3)]
)
def test_every_round_has_its_own_amount(method) -> None:
    model, masks = mlp(widths=(30, 20)), None
    for number in range(3):
        masks = method.masks(model, number, masks)

    # A rate at which float32 weights do not move.
    result = method.run(model, rows(), epochs=3, learning_rate=1e-20, verbose=0)

    assert Masks.of_zeros(result.model) == masks


class _Stop(Exception):
    pass


@pytest.mark.parametrize(
    ("method", "after"),
    [
        (Han(quality=[0.3, 0.5, 0.9]), 0),
        (DSD(0.5, dense_epochs=1), 1),
    ],
    ids=["han", "dsd"],
)
def test_an_interrupted_run_ends_like_an_uninterrupted_one(method, after, tmp_path) -> None:
    data = rows(count=32)
    options = {"epochs": 3, "learning_rate": 0.05, "batch_size": 8, "verbose": 0}
    whole = method.run(mlp(widths=(20, 10)), data, **options)

    def stop(epoch, values):
        if epoch == after:
            raise _Stop

    options["checkpoint"] = tmp_path / "state.npz"
    with pytest.raises(_Stop):
        method.run(mlp(widths=(20, 10)), data, on_epoch_end=stop, **options)
    resumed = method.run(mlp(widths=(20, 10)), data, **options)

    assert resumed.record.resumed_from == after + 1
    assert same(snapshot(whole.model), resumed.model)
    assert resumed.sparsity == whole.sparsity


@pytest.mark.parametrize("option", [{"restore_best": True}, {"patience": 2}])
def test_an_earlier_epoch_cannot_be_the_result_where_masks_change(option) -> None:
    data = rows()
    with pytest.raises(ArgumentError, match=r"to its last epoch.*another sparsity"):
        Han(quality=[0.3, 0.5]).run(mlp(), data, data, epochs=2, **option)
    # With one round, whose masks are held, it can.
    method = Han(quality=0.3)
    result = method.run(mlp(), data, data, epochs=2, verbose=0, **option)
    assert result.sparsity == method.masks(mlp()).sparsity


@pytest.mark.parametrize("epochs", [2, 0, True, 2.5])
def test_epochs_too_few_for_the_rounds_are_refused(epochs) -> None:
    with pytest.raises(ArgumentError, match="epochs"):
        Han(quality=[0.3, 0.5], epochs_per_round=2).run(mlp(), rows(), epochs=epochs)


def test_callbacks_work_under_a_distribution_strategy() -> None:
    strategy = tf.distribute.MirroredStrategy(["/cpu:0"])
    x, y = rows(count=32)
    for method in (Han(quality=[0.3, 0.6]), DSD(0.5)):
        with strategy.scope():
            prepared = method.prepare(mlp(widths=(20, 10), hidden="tanh"))
            prepared.compile(
                keras.optimizers.SGD(0.05, momentum=0.9),
                keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            )
        assert prepared.distribute_strategy is strategy
        prepared.fit(x, y, epochs=2, batch_size=16, verbose=0, callbacks=method.callbacks())
        finished = method.finish(prepared)
        expected = masks_of(prepared)
        assert Masks.of_zeros(finished) == expected
        assert (expected.sparsity == 0) == isinstance(method, DSD)


def test_the_lottery_ticket_example_runs() -> None:
    keras.utils.set_random_seed(0)
    found = doctest.DocTestFinder(recurse=False).find(
        tfprune.methods,
        globs={"model": mlp(widths=(20, 10)), "train": rows(), "fine_tune": fine_tune},
    )
    (example,) = [test for test in found if test.name == "tfprune.methods"]
    assert len(example.examples) == 9
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example)
    assert results.failed == 0


def test_finishing_leaves_the_trained_model_as_it_was() -> None:
    model = mlp()
    wrapped = with_masks(model, RandomPruning(0.5).masks(model))
    before = snapshot(wrapped)

    finished = RandomPruning(0.5).finish(wrapped)

    assert same(before, wrapped)
    assert finished is not wrapped
    x = rows()[0]
    np.testing.assert_array_equal(finished(x), wrapped(x))


def test_finishing_can_make_the_model_smaller() -> None:
    model = mlp(widths=(6, 5))
    kernels = {path: np.ones(tuple(v.shape), bool) for path, v in prunable_weights(model).items()}
    kernels["fc1/kernel"][:, :2] = False  # two units without inputs, and with a bias of zero
    kernels["fc2/kernel"][:, 4] = False
    wrapped = with_masks(model, Masks(kernels))

    finished = RandomPruning(0.5).finish(wrapped, structured=True)

    assert [layer.units for layer in finished.layers] == [4, 4, 3]
    x = rows()[0]
    # The same sums of at most 7 terms in another order of float32.
    np.testing.assert_allclose(finished(x), wrapped(x), atol=1e-6)
