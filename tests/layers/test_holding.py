"""Masks from elsewhere are held in training, and can be replaced in it."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import tfprune
from tests.layers.networks import nested, normal, small
from tfprune.errors import ArgumentError
from tfprune.layers import Masks, masks_of, prunable_weights, set_masks, with_masks
from tfprune.layers.prunable import is_wrapper

X, Y = normal(32, 8), normal(32, 4, seed=1)


def _random(model, seed):
    """A third of all weights."""
    random = np.random.default_rng(seed)
    return Masks(
        {path: random.random(tuple(v.shape)) < 1 / 3 for path, v in prunable_weights(model).items()}
    )


def _require_masked(model, masks):
    assert masks_of(model) == masks
    for path, weight in prunable_weights(model).items():
        assert not np.asarray(weight)[~masks[path]].any(), path
        assert np.asarray(weight)[masks[path]].all(), path


def test_masks_are_held_and_replaced_in_training() -> None:
    model = small()
    first, second = _random(model, 0), _random(model, 1)

    class Replace(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                set_masks(self.model, second)
                assert masks_of(self.model) == second
                for path, weight in prunable_weights(self.model).items():
                    assert not np.asarray(weight)[~second[path]].any()  # at once

    wrapped = with_masks(model, first)
    _require_masked(wrapped, first)  # at once
    wrapped.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    callbacks = [tfprune.UpdatePruningStep()]
    wrapped.fit(X, Y, batch_size=8, verbose=0, callbacks=callbacks)
    _require_masked(wrapped, first)
    wrapped.fit(X, Y, batch_size=8, verbose=0, callbacks=[*callbacks, Replace()])
    # what the second masks let in again has been trained since
    _require_masked(wrapped, second)
    assert Masks.of_zeros(tfprune.strip_pruning(wrapped)) == second
    assert np.asarray(prunable_weights(model)["hidden/kernel"]).all()


def test_weights_that_are_not_mentioned() -> None:
    masks = {"hidden/kernel": np.arange(128).reshape(8, 16) % 4 > 0}
    wrapped = with_masks(small(), Masks(masks))
    assert masks_of(wrapped).sparsities == {"hidden/kernel": 0.25, "head/kernel": 0.0}
    head = {"head/kernel": np.arange(64).reshape(16, 4) % 2}
    set_masks(wrapped, Masks(head))
    assert masks_of(wrapped).sparsities == {"hidden/kernel": 0.25, "head/kernel": 0.5}


def test_nested_models() -> None:
    model, inputs = nested()
    masks = _random(model, 0)
    assert list(masks) == ["middle/inner/a/kernel", "middle/b/kernel", "head/kernel"]
    wrapped = with_masks(model, masks)
    _require_masked(wrapped, masks)
    np.testing.assert_array_equal(
        np.asarray(wrapped(inputs)), np.asarray(masks.apply(model)(inputs))
    )
    ones = Masks({"middle/b/kernel": np.ones((4, 4))})
    set_masks(wrapped, ones)
    assert masks_of(wrapped)["middle/b/kernel"].all()
    assert masks_of(wrapped)["head/kernel"].tolist() == masks["head/kernel"].tolist()


def test_a_model_of_which_only_parts_are_wrapped() -> None:
    class OnlyHead(tfprune.PruningPolicy):
        def allow_pruning(self, layer):
            return layer.name == "head"

        def ensure_model_supports_pruning(self, model):
            pass

    model = small()
    masks = _random(model, 0)
    partly = tfprune.prune_low_magnitude(model, pruning_policy=OnlyHead())
    assert list(masks_of(partly)) == ["head/kernel"]
    with pytest.raises(ArgumentError, match=r"for \['hidden/kernel'\], whose layers have none"):
        set_masks(partly, masks)
    assert masks_of(partly).sparsity == 0  # nothing was done by halves
    # ones for the others say nothing
    set_masks(partly, Masks({**Masks.ones(model), "head/kernel": masks["head/kernel"]}))
    assert masks_of(partly)["head/kernel"].tolist() == masks["head/kernel"].tolist()
    # with_masks wraps the rest, and leaves the wrapper that was there its schedule
    wrapped = with_masks(partly, masks)
    _require_masked(wrapped, masks)
    schedules = [layer.pruning_schedule for layer in wrapped.layers if is_wrapper(layer)]
    assert [type(one).__name__ for one in schedules] == ["Fixed", "ConstantSparsity"]


def test_masks_of_a_plain_model_are_none() -> None:
    assert list(masks_of(small())) == []
