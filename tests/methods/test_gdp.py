"""Global and dynamic filter pruning."""

from __future__ import annotations

from itertools import pairwise

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfprune
from tests.methods.models import residual, snapshot, stir, stripes
from tfprune.criteria.scores import Scores
from tfprune.errors import ArgumentError, DataError
from tfprune.methods import GlobalDynamicPruning

DATA = stripes(48)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def method(**arguments):
    given = {"data": DATA, "macs": 0.6, "every": 3, "batches": 2, "batch_size": 16}
    return GlobalDynamicPruning(**{**given, **arguments})


def fitted(model, how, epochs=2, **options):
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), LOSS, **options)
    return model.fit(
        *DATA, batch_size=16, epochs=epochs, shuffle=False, verbose=0, callbacks=how.callbacks()
    )


def test_saliency_is_the_mean_over_batches_of_the_filters_sum() -> None:
    """Sheet B8.3: |sum w dL/dw| per batch, written out filter by filter."""
    model = stir(residual())
    how = method()
    prepared = how.prepare(model)
    before = snapshot(prepared)
    found = how.saliency(prepared)
    assert all(np.array_equal(a, b) for a, b in zip(before, snapshot(prepared), strict=True))
    kernel = prepared.get_layer("first").kernel
    both = [prepared.get_layer(name).kernel for name in ("stem", "second")]
    first, stream = [], []
    for start in (0, 16):
        with tf.GradientTape() as tape:
            logits = prepared(DATA[0][start : start + 16], training=True)
            loss = LOSS(DATA[1][start : start + 16], logits)
        gradients = tape.gradient(loss, [kernel.value, *(k.value for k in both)])
        products = [
            (np.asarray(k) * np.asarray(g)).reshape(-1, k.shape[-1]).sum(0)
            for k, g in zip([kernel, *both], gradients, strict=True)
        ]
        first.append(np.abs(products[0]))
        stream.append(np.abs(products[1] + products[2]))
    # float32 sums in another order; the statistics moved between the batches, and are not used
    np.testing.assert_allclose(found["first"], np.mean(first, 0), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found["stem"], np.mean(stream, 0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("recovery", ["straight-through", "rescoring"])
def test_what_a_step_does_to_masked_weights(recovery) -> None:
    """Plain SGD, one step: W moves by the gradient at m W, or stands still where masked."""
    how = method(recovery=recovery)
    model = how.prepare(stir(residual()))
    kept = {"first": [0, 2, 3], "last": list(range(5))}
    model.update.mask(kept)
    layer = model.get_layer("first")
    whole = np.asarray(model.update.held.weights[id(layer.kernel)][1]).copy()
    with tf.GradientTape() as tape:
        loss = LOSS(DATA[1][:16], model(DATA[0][:16], training=True))
    gradient = np.asarray(tape.gradient(loss, layer.kernel.value))
    model = how.prepare(stir(residual()))
    model.update.mask(kept)
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    model.fit(DATA[0][:16], DATA[1][:16], batch_size=16, verbose=0)
    layer = model.get_layer("first")
    mask = np.isin(np.arange(6), kept["first"])
    learns = 1.0 if recovery == "straight-through" else mask
    expected = whole - 0.1 * gradient * learns
    after = np.asarray(model.update.held.weights[id(layer.kernel)][1])
    # float32, the same gradient traced twice
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(layer.kernel), after * mask)
    assert not np.asarray(model.get_layer("first_bn").beta)[~mask].any()


def test_masks_are_chosen_again_and_filters_come_back() -> None:
    how = method(every=2)
    model = how.prepare(stir(residual()))
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            seen.append(np.concatenate(list(self.model.update.masks().values())))

    model.compile(keras.optimizers.SGD(0.3, momentum=0.9), LOSS)
    model.fit(
        *DATA, batch_size=8, epochs=3, shuffle=False, verbose=0,
        callbacks=[*how.callbacks(), Watch()],
    )  # fmt: skip
    changes = [not np.array_equal(a, b) for a, b in pairwise(seen)]
    assert any(changes[1::2]) and not any(changes[::2])  # after every second step only
    assert any(((b == 1) & (a == 0)).any() for a, b in pairwise(seen))


def test_frozen_masks_stay() -> None:
    how = method(every=2, frozen_after=0)
    model = how.prepare(stir(residual()))
    history = fitted(model, how).history
    fresh = how.prepare(stir(residual()))
    saliency = Scores(how.saliency(fresh), "saliency")
    first = how.decide(tfprune.analyse(fresh), saliency).kept
    for name, mask in model.update.masks().items():
        kept = first.get(name, range(len(mask)))
        np.testing.assert_array_equal(np.flatnonzero(mask), sorted(kept))
    assert len(set(history["masked"])) == 1


@pytest.mark.parametrize("recovery", ["straight-through", "rescoring"])
def test_a_run_ends_in_the_network_that_was_trained(recovery) -> None:
    result = method(recovery=recovery).run(
        stir(residual()), DATA, epochs=2, batch_size=16, learning_rate=0.1, verbose=0
    )
    assert result.macs <= 0.6
    # masked channels are zero everywhere: only the order of float32 sums differs
    assert result.difference < 1e-5


def test_going_on_from_a_file(tmp_path) -> None:
    how = method()
    whole = how.prepare(stir(residual()))
    fitted(whole, how, epochs=2)
    half = how.prepare(stir(residual()))
    fitted(half, how, epochs=1)
    half.save(tmp_path / "half.keras")
    half = keras.models.load_model(tmp_path / "half.keras")
    half.fit(
        *DATA, batch_size=16, initial_epoch=1, epochs=2, shuffle=False, verbose=0,
        callbacks=how.callbacks(),
    )  # fmt: skip
    for a, b in zip(whole.variables, half.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=a.path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"macs": None}, "macs or pruning_ratio"),
        ({"every": 0}, "every"),
        ({"recovery": "none"}, "recovery"),
        ({"frozen_after": -1}, "frozen_after"),
    ],
    ids=range(4),
)
def test_arguments(arguments, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        method(**arguments)


def test_data_and_steps_that_do_not_fit() -> None:
    with pytest.raises(DataError, match="Received: none"):
        method(data=None).prepare(residual())
    how = method()
    with pytest.raises(ArgumentError, match="steps_per_execution"):
        fitted(how.prepare(residual()), how, steps_per_execution=2)
