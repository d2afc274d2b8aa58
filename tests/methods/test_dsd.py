"""Dense, sparse, dense: phases, and what happens to weights that come back."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tests.methods.models import lenet_5, mlp, rows, same, snapshot
from tfprune.errors import ArgumentError
from tfprune.layers import (
    Masks,
    UpdatePruningStep,
    masks_of,
    prunable_weights,
    set_masks,
    with_masks,
)
from tfprune.methods import DSD
from tfprune.methods.dsd import release, slots_of


def test_the_first_convolution_stays_dense_and_the_rest_keep_their_count() -> None:
    model = lenet_5()
    masks = DSD(0.3).masks(model)

    kept = {path: int(mask.sum()) for path, mask in masks.items()}
    assert kept == {
        "conv1/kernel": 500,
        "conv2/kernel": 25_000 * 7 // 10,
        "fc1/kernel": 400_000 * 7 // 10,
        "fc2/kernel": 5000 * 7 // 10,
    }
    for path, variable in list(prunable_weights(model).items())[1:]:
        magnitudes = np.abs(np.asarray(variable))
        assert magnitudes[masks[path]].min() >= magnitudes[~masks[path]].max()


def test_what_stays_dense_can_be_named() -> None:
    model = lenet_5()

    excluded = DSD(0.3, exclude=["fc*"]).masks(model)
    assert [path for path, s in excluded.sparsities.items() if s] == [
        "conv1/kernel",
        "conv2/kernel",
    ]
    assert all(DSD(0.3, exclude=[]).masks(model).sparsities.values())
    assert all(DSD(0.3).masks(mlp()).sparsities.values())  # no convolution to leave out
    with pytest.raises(ArgumentError, match="'fc9/kernel', which fits none"):
        DSD(0.3, exclude=["fc9/kernel"]).prepare(model)


class _Sparsity(keras.callbacks.Callback):
    """Writes down the masks' sparsity and the learning rate at every epoch's first batch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            rate = float(np.asarray(self.model.optimizer.learning_rate))
            self.seen.append((masks_of(self.model).sparsity, rate))


def test_the_phases_follow_each_other() -> None:
    # Smooth, because weights into a ReLU that is off for all examples stay at zero.
    model, data = mlp(widths=(20, 10), hidden="tanh"), rows(count=32)
    before = snapshot(model)
    method, watcher = DSD(0.5, dense_epochs=1, sparse_epochs=2), _Sparsity()

    result = method.run(
        model, data, epochs=4, learning_rate=0.1, batch_size=16, verbose=0, callbacks=[watcher]
    )

    sparsities, rates = zip(*watcher.seen, strict=True)
    assert sparsities == (0, 0.5, 0.5, 0)
    # float32 learning rates
    np.testing.assert_allclose(rates, [0.1, 0.01, 0.01, 0.001], rtol=1e-6)
    assert result.record.history["learning_rate"] == pytest.approx((0.1, 0.01, 0.01, 0.001))
    assert result.sparsity == 0
    assert type(result.model.layers[0]) is keras.layers.Dense
    assert same(before, model)


def test_a_schedule_of_the_users_is_multiplied() -> None:
    watcher = _Sparsity()
    DSD(0.5, sparse_epochs=2, learning_rate_factors=(1, 1, 0.1)).run(
        mlp(), rows(), epochs=4, learning_rate=1.0, schedule=lambda progress: 1 - progress,
        verbose=0, callbacks=[watcher],
    )  # fmt: skip

    rates = [rate for _, rate in watcher.seen]
    np.testing.assert_allclose(rates, [1.0, 0.75, 0.05, 0.025], rtol=1e-6)  # float32


def test_phases_are_told_by_whole_epochs_however_the_progress_is_rounded() -> None:
    for epochs in range(4, 120):
        method = DSD(
            0.5, dense_epochs=1, sparse_epochs=epochs // 2, learning_rate_factors=(3, 2, 1)
        )
        schedule = method.fit_options(epochs, {})["schedule"]
        # (epoch / epochs) * epochs is below epoch for some, 1 of 49 the first
        rates = [schedule(epoch / epochs) for epoch in range(epochs)]
        assert rates == [3] + [2] * (epochs // 2) + [1] * (epochs - 1 - epochs // 2)


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.05),
    "adagrad": lambda: keras.optimizers.Adagrad(0.05, initial_accumulator_value=0.25),
    "ema": lambda: keras.optimizers.SGD(0.05, momentum=0.9, use_ema=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_that_come_back_start_from_zero_with_fresh_state_and_learn(name) -> None:
    model, (x, y) = mlp(widths=(20, 10), hidden="tanh"), rows(count=32)
    masks = DSD(0.5).masks(model)
    wrapped = with_masks(model, masks)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    wrapped.compile(OPTIMIZERS[name](), loss)
    wrapped.fit(x, y, epochs=2, verbose=0, callbacks=[UpdatePruningStep()])
    slots = slots_of(wrapped.optimizer, wrapped.trainable_variables)
    weights = prunable_weights(wrapped)
    filled = {
        path: {slot: np.asarray(v).copy() for slot, v in slots[weight.path].items()}
        for path, weight in weights.items()
    }

    release(wrapped)

    assert masks_of(wrapped).sparsity == 0
    for path, weight in weights.items():
        gone = ~masks[path]
        assert not np.asarray(weight)[gone].any()
        assert np.asarray(weight)[~gone].all()
        assert filled[path]
        for slot, before in filled[path].items():
            now = np.asarray(slots[weight.path][slot])
            start = 0.25 if slot == "accumulator" else 0.0
            assert (now[gone] == start).all(), slot
            np.testing.assert_array_equal(now[~gone], before[~gone])
    wrapped.fit(x, y, epochs=1, batch_size=32, verbose=0, callbacks=[UpdatePruningStep()])
    for path, weight in weights.items():
        assert np.asarray(weight)[~masks[path]].all(), path


def test_slots_are_found_by_the_longest_path() -> None:
    layers = keras.layers
    model = keras.Sequential([keras.Input((3,))])
    for name in ("a", "a_kernel", "b"):
        model.add(layers.Dense(3, name=name))
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)

    slots = slots_of(optimizer, model.trainable_variables)

    paths = [variable.path for variable in model.trainable_variables]
    assert list(slots) == paths
    assert all(set(found) == {"momentum", "velocity"} for found in slots.values())
    distinct = {id(slot) for found in slots.values() for slot in found.values()}
    assert len(distinct) == 2 * len(paths)


def test_releasing_needs_no_optimizer() -> None:
    model = mlp()
    wrapped = with_masks(model, DSD(0.5).masks(model))
    # As after the optimizer's step, before the masks are applied again.
    kernel = prunable_weights(wrapped)["fc1/kernel"]
    kernel.assign(np.ones(tuple(kernel.shape)))
    masks = masks_of(wrapped)

    release(wrapped)

    np.testing.assert_array_equal(np.asarray(kernel), masks["fc1/kernel"].astype("float32"))
    set_masks(wrapped, Masks.ones(model))  # still a wrapped model


def test_too_few_epochs_are_refused_before_any_training() -> None:
    with pytest.raises(ArgumentError, match=r"at least 4 epochs.*Received: 3"):
        DSD(0.5, dense_epochs=1, sparse_epochs=2).run(mlp(), rows(), epochs=3)


@pytest.mark.parametrize(
    "arguments",
    [
        {"sparsity": 1.0},
        {"dense_epochs": -1},
        {"sparse_epochs": 0},
        {"exclude": "conv*"},
        {"learning_rate_factors": (1.0, 0.1)},
        {"learning_rate_factors": (1.0, 0.1, 0.0)},
    ],
)
def test_arguments_that_make_no_sense(arguments) -> None:
    with pytest.raises(ArgumentError):
        DSD(**arguments)
