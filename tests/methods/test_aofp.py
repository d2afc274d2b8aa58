"""AOFP in training: its steps, its stop, and that what it masks is what surgery removes."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from itertools import pairwise

import keras
import numpy as np
import pytest

import tfprune
from tests import toys
from tests.criteria.test_gates import concatenation
from tests.methods.models import same, snapshot
from tfprune.cost import measure
from tfprune.criteria.damage import damage_of
from tfprune.errors import ArgumentError, BudgetError, DataError, ModelError
from tfprune.graph.evaluate import call_model
from tfprune.methods.aofp import (
    ApproximatedOracle,
    HalvingSearch,
    Targets,
    damage_function,
    starts,
)

X, Y = toys.images(48), toys.labels(48)
QUICK = {"theta": 0.3, "steps_per_half": 3, "warmup": 1, "batch_size": 16}


def method(macs=0.5, data=X, **options):
    return ApproximatedOracle(macs, data, **{**QUICK, **options})


def run(model, made, epochs=40, **options):
    return made.run(model, (X, Y), epochs=epochs, batch_size=16, verbose=0, **options)


def fitted(model, made, epochs, *callbacks):
    """A prepared model, trained with ``fit``, and the search."""
    prepared = made.prepare(model)
    search = HalvingSearch(made)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    prepared.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    callbacks = [search, *callbacks]
    prepared.fit(X, Y, epochs=epochs, batch_size=16, verbose=0, shuffle=False, callbacks=callbacks)
    return prepared, search


class AfterEveryStep(keras.callbacks.Callback):
    """Calls a function of the model after every batch."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def on_train_batch_end(self, batch, logs=None):
        self.function(self.model)


def test_staggered_starts():
    """Sheet B1, step 2: warmup + i * floor(iters_per_half / n)."""
    assert starts(3, 500, 1000) == [500, 833, 1166]
    assert starts(13, 500, 1000)[-1] == 500 + 12 * 76
    assert starts(4, 0, 3) == [0, 0, 0, 0]


def test_first_decisions_come_when_the_halves_end():
    """Group i begins after its start, and decides steps_per_half steps later."""
    made = method(0.05, theta=1e9, warmup=2, steps_per_half=6)
    _, search = fitted(toys.chain(), made, 4)
    first: dict[str, int] = {}
    for move in search.moves:
        first.setdefault(move.group, move.step)
    assert first == {"conv0": 2 + 0 + 6, "conv1": 2 + 2 + 6, "conv2": 2 + 4 + 6}
    # With such a theta every half is accepted whole.
    assert [len(m.channels) for m in search.moves[:3]] == [4, 6, 8]
    np.testing.assert_array_less(np.diff([m.macs for m in search.moves]), 0)


@pytest.mark.parametrize("build", [toys.chain, toys.residual, concatenation])
def test_damage_is_that_of_the_criterion(build):
    """One compiled pass for all groups, against one group after the other."""
    model = build()
    graph = tfprune.analyse(model)
    targets = Targets(method(), graph)
    random = np.random.default_rng(0)
    dropped = {
        g.name: np.sort(random.choice(g.width, g.width // 2, replace=False)) for g in targets.groups
    }
    found = damage_function(targets)([X[:8]], dropped)
    assert found.keys() == dropped.keys() and found
    for name, indices in dropped.items():
        alive = np.arange(graph[name].width)
        # float32 sums of squares.
        expected = damage_of(graph, name, [[X[:8]]])(0, alive, indices)
        assert found[name] == pytest.approx(expected, rel=1e-4)
        # The squeezed channels that are dropped happen to be dead.
        assert expected > 0 or name == "squeeze"


@pytest.mark.parametrize("build", [toys.residual, concatenation])
def test_base_path_is_the_pruned_model_after_every_move(build):
    """Sheet B1, check (ii)."""
    model = build()
    made = method(0.3)
    seen: dict[int, float] = {}
    searches = []

    def compare(prepared):
        moves = len(searches[0].moves)
        if moves in seen:
            return
        small = made.finish(prepared)
        masked, pruned = (np.asarray(m(X[:6], training=False)) for m in (prepared, small))
        # float32 sums in another order.
        np.testing.assert_allclose(pruned, masked, atol=1e-5 * np.abs(masked).max())
        seen[moves] = measure(small).macs / measure(model).macs
        prepared.stop_training = len(seen) == 3

    prepared = made.prepare(model)
    searches.append(HalvingSearch(made))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    prepared.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss)
    prepared.fit(
        X, Y, epochs=12, batch_size=16, verbose=0, callbacks=[searches[0], AfterEveryStep(compare)]
    )
    moves = searches[0].moves
    assert len(moves) >= 2 and len(seen) >= 3
    for number, fraction in seen.items():
        assert fraction == (moves[number - 1].macs if number else 1)


def test_run_meets_the_target_and_says_how():
    model = toys.residual()
    before = snapshot(model)
    result = run(model, method(0.5))
    assert result.reached and result.macs <= 0.5
    assert result.macs == measure(result.model).macs / measure(model).macs
    assert result.macs == result.moves[-1].macs
    # It was the last move that met it, and the training ended there.
    assert all(move.macs > 0.5 for move in result.moves[:-1])
    assert result.record.stopped_early and result.record.epochs == -(-result.moves[-1].step // 3)
    assert not result.skipped and same(before, model)
    gone: dict[str, list[int]] = {}
    for move in result.moves:
        assert move.worst < 0.3
        gone.setdefault(move.group, []).extend(move.channels)
    graph = tfprune.analyse(model)
    pruned = tfprune.analyse(result.model)
    for name, channels in gone.items():
        assert len(set(channels)) == len(channels)
        assert pruned[name].width == graph[name].width - len(channels)
    assert np.isfinite(call_model(result.model, [X[:2]])[0]).all()


def test_same_seed_same_result():
    first, second = (run(toys.chain(widths=(6, 7)), method(0.6, seed=3)) for _ in range(2))
    assert first.moves == second.moves and first.moves
    assert same(snapshot(first.model), second.model)


def test_epochs_that_do_not_suffice_are_told():
    model = toys.chain()
    with pytest.warns(UserWarning, match=r"The epochs were over.* 0.5 were asked for"):
        result = run(model, method(theta=1e-9), epochs=2)
    assert not result.reached and result.macs == 1 and not result.moves
    assert not result.record.stopped_early
    assert measure(result.model).macs == measure(model).macs


def test_dead_filters_go_alone():
    """Sheet B1, check (i): with a theta next to nothing only filters without any effect go."""
    model = toys.chain()
    norm = model.get_layer("norm0")
    dead = [0, 3, 4, 6, 7]
    for variable, value in ((norm.gamma, 0.0), (norm.beta, -1.0)):
        array = np.asarray(variable).copy()
        array[dead] = value
        variable.assign(array)
    made = method(0.7, theta=1e-12, steps_per_half=12, warmup=0, ignore=["conv1", "conv2"])
    _, search = fitted(model, made, 24)
    removed = [channel for move in search.moves for channel in move.channels]
    assert removed and set(removed) <= set(dead)
    assert all(move.worst == 0 for move in search.moves)


def test_removed_channels_are_held_at_zero_and_found_again():
    made = method(0.3)
    read = []

    def look(prepared):
        targets = Targets(made, tfprune.analyse(prepared))
        read.append(targets.kept())

    prepared, search = fitted(toys.chain(), made, 3, AfterEveryStep(look))
    assert search.moves
    for before, after in pairwise(read):
        assert all(np.isin(after[name], before[name]).all() for name in before)
    gone = {name: set() for name in read[-1]}
    for move in search.moves:
        gone[move.group] |= set(move.channels)
    for name, kept in read[-1].items():
        assert gone[name] == set(range(tfprune.analyse(prepared)[name].width)) - set(kept)

    again = HalvingSearch(made)
    again.set_model(prepared)
    again.on_train_begin()
    assert again._step == len(read) == search.moves[-1].step
    for name, found in again._searches.items():
        np.testing.assert_array_equal(found.alive, read[-1][name])


def test_fewest_channels_stay():
    made = method(0.44, theta=1e9, min_channels=5, ignore=["conv1"])
    model = toys.chain()
    result = run(model, made)
    widths = {group.name: group.width for group in tfprune.analyse(result.model).prunable}
    assert widths == {"conv0": 5, "conv1": 12, "conv2": 5}
    assert result.skipped == {"conv1": "it is to be ignored"}
    with pytest.raises(BudgetError, match=r"at least 0.*keeps 6 channels"):
        method(0.2, min_channels=6).prepare(model)


def test_what_cannot_be_searched_is_told():
    layers = keras.layers
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, activation="relu", name="first")(inputs)
    x = layers.Conv2D(8, 3, name="second")(x)
    x = layers.LayerNormalization(name="norm")(x)
    x = layers.Reshape((16, 8), name="rows")(x)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.GlobalAveragePooling1D(name="pool")(x)
    model = keras.Model(inputs, layers.Dense(5, name="head")(x))
    targets = Targets(method(), tfprune.analyse(model))
    assert "norm" in targets.skipped["second"]
    assert "inside a layer" in targets.skipped["attention:heads"]
    assert {group.name for group in targets.groups} == {"first", "attention:output"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"macs": 1}, "below 1"),
        ({"macs": 0.0}, "macs"),
        ({"theta": 0}, "theta"),
        ({"theta": float("nan")}, "theta"),
        ({"data": None}, "data"),
        ({"steps_per_half": 0}, "steps_per_half"),
        ({"warmup": -1}, "warmup"),
        ({"min_channels": 0}, "min_channels"),
        ({"batches": 0}, "batches"),
        ({"ignore": "conv1"}, "ignore"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments(options, words):
    with pytest.raises(ArgumentError, match=words):
        method(**options)


def test_errors_come_before_training():
    model = toys.chain()
    with pytest.raises(ArgumentError, match="restore_best"):
        run(model, method(), restore_best=True)
    with pytest.raises(ArgumentError, match="epochs"):
        run(model, method(), epochs=0)
    with pytest.raises(ArgumentError, match="matches none"):
        run(model, method(ignore=["other"]))
    with pytest.raises(ArgumentError, match=r"to search.*ignored"):
        run(model, method(ignore=["*"]))
    with pytest.raises(DataError, match="shape"):
        run(model, method(data=X[:, :4]))
    with pytest.raises(ModelError):
        run(keras.Sequential([keras.layers.Dense(3)]), method())
    with pytest.raises(FrozenInstanceError):
        method().macs = 0.3
    made = method()
    prepared = made.prepare(model)
    prepared.compile("sgd", "sparse_categorical_crossentropy", steps_per_execution=2)
    with pytest.raises(ArgumentError, match="steps_per_execution"):
        prepared.fit(X, Y, verbose=0, callbacks=made.callbacks())
