"""Soft filter pruning."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest

import tfprune
from tests.methods.models import residual, stir, stripes
from tfprune.errors import ArgumentError
from tfprune.methods import SoftFilterPruning
from tfprune.methods.sfp import ZeroFilters, zero_filters
from tfprune.methods.structured import difference

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def zero_kernels(model):
    """Layer -> numbers of the filters whose kernels are zero."""
    return {
        layer.name: np.flatnonzero(~np.asarray(layer.kernel).any(axis=(0, 1, 2))).tolist()
        for layer in model.layers
        if isinstance(layer, keras.layers.Conv2D)
    }


def test_the_filters_of_lowest_norm_are_zeroed() -> None:
    """Sheet A9.1: ``int(m P)`` of every layer; of a coupled group, in all that make it."""
    model = residual()
    method = SoftFilterPruning(pruning_ratio=0.35)
    prepared = method.prepare(model)
    norms = np.linalg.norm(np.asarray(model.get_layer("first").kernel).reshape(-1, 6), axis=0)
    zero_filters(tfprune.analyse(prepared), method.plan(prepared))
    found = zero_kernels(prepared)
    assert found["first"] == sorted(np.argsort(norms)[:2])  # int(6 x 0.35) = 2
    assert len(found["stem"]) == 2 and found["stem"] == found["second"]  # int(8 x 0.35) = 2
    assert len(found["last"]) == 3  # int(10 x 0.35) = 3
    # batch normalisation is left as it is
    for name in ("stem_bn", "last_bn"):
        for before, after in zip(
            model.get_layer(name).weights, prepared.get_layer(name).weights, strict=True
        ):
            np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize(
    ("width", "ratio", "kept"), [(16, 0.3, 12), (16, 0.1, 15), (10, 0.9, 1)], ids=range(3)
)
def test_counts_are_those_of_the_authors(width, ratio, kept) -> None:
    """Sheet A0.2: pruned = int(m p), so that 16 at 0.3 keep 12, not floor(11.2)."""
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((4, 4, 1)), layers.Conv2D(width, 3, name="a"), layers.Flatten(),
         layers.Dense(2)]
    )  # fmt: skip
    method = SoftFilterPruning(pruning_ratio=ratio)
    assert len(method.plan(method.prepare(model)).kept["a"]) == kept


class Watch(keras.callbacks.Callback):
    """Notes which filters are zero: when validation begins, and when an epoch ends."""

    def __init__(self) -> None:
        super().__init__()
        self.validation, self.epochs, self.within = [], [], []

    def on_test_begin(self, logs=None):
        self.validation.append(zero_kernels(self.model))

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(zero_kernels(self.model))

    def on_train_batch_end(self, batch, logs=None):
        self.within.append(zero_kernels(self.model))


def test_zeroed_filters_move_again_and_may_come_back() -> None:
    """The set is chosen anew every epoch; in between nothing is held at zero."""
    model = stir(residual())
    for layer in model.layers:
        if layer.name.endswith("_bn"):  # a shift above 0 passes gradients
            layer.beta.assign(np.full(layer.beta.shape, 0.5))
    method = SoftFilterPruning(pruning_ratio=0.3)
    prepared = method.prepare(model)
    prepared.compile(keras.optimizers.SGD(0.3, momentum=0.9), LOSS)
    watch = Watch()
    data = stripes(64)
    prepared.fit(
        *data, batch_size=16, epochs=4, verbose=0, validation_data=data,
        callbacks=[*method.callbacks(), watch],
    )  # fmt: skip
    assert watch.validation == watch.epochs  # validation sees the zeroed network
    assert all(len(zeros["last"]) == 3 for zeros in watch.epochs)
    assert all(not zeros["last"] for zeros in watch.within)  # all filters move within an epoch
    sets = [tuple(zeros["last"]) for zeros in watch.epochs]
    assert len(set(sets)) > 1, sets  # some came back


def test_zeroed_before_its_first_epoch_a_fresh_filter_never_comes_back() -> None:
    """Shifts of 0 and ReLU pass no gradient: the reason for ``at_start=False``."""
    data = stripes(64)
    for at_start, expected in ((True, 1), (False, 2)):
        prepared = SoftFilterPruning(pruning_ratio=0.3).prepare(residual())
        prepared.compile(keras.optimizers.SGD(0.3, momentum=0.9), LOSS)
        watch = Watch()
        zero = ZeroFilters(SoftFilterPruning(pruning_ratio=0.3), at_start)
        prepared.fit(*data, batch_size=16, epochs=2, verbose=0, callbacks=[zero, watch])
        moments = {tuple(zeros["last"]) for zeros in watch.within}
        # once zeroed at the start, the same three stay zero in every step
        assert (len(next(iter(moments))) == 3) == at_start
        assert len(moments) < expected + 1


@pytest.mark.parametrize("asked", [{"macs": 0.5}, {"pruning_ratio": 0.3}], ids=["macs", "ratio"])
def test_a_run(asked) -> None:
    method = SoftFilterPruning(**asked, at_start=False)
    data = stripes(96)
    result = method.run(
        stir(residual()), data, stripes(24, 1), epochs=3, learning_rate=0.1, verbose=0
    )
    assert result.macs <= asked.get("macs", 0.75)
    assert zero_kernels(result.trained)["first"] == sorted(
        set(range(6)) - set(result.plan.kept["first"])
    )
    assert not any(zero_kernels(result.model).values())
    # what batch normalisation makes of zero filters is taken up, but for borders of zeros
    without = dataclasses.replace(method, absorb=False).finish(result.trained)
    dropped = difference(result.trained, without, data)
    assert result.difference < dropped / 2
    assert tfprune.verify(result.trained, result.plan).passed


def test_arguments() -> None:
    with pytest.raises(ArgumentError, match="macs or pruning_ratio"):
        SoftFilterPruning()
