"""When masks are updated."""

from __future__ import annotations

import numpy as np
import pytest

from tests.schedules.examples import Square
from tfprune import schedules


def _updates(schedule, steps=range(1000)):
    return [int(step) for step, update in zip(steps, schedule.curve(steps)[0], strict=True)
            if update]  # fmt: skip


def _updates_of_tfmot(schedule, steps=1000):
    return np.flatnonzero(schedule(np.arange(steps))[0]).tolist()


@pytest.mark.parametrize(("begin", "end", "frequency"), [(0, 600, 100), (7, 67, 3), (5, 5, 9)])
def test_as_in_tfmot_where_the_frequency_divides(begin, end, frequency):
    theirs = schedules.PolynomialDecay(0.0, 0.8, begin, end, frequency=frequency)
    for kind in ("Polynomial", "Linear", "Cosine", "Exponential", "OneCycle"):
        ours = getattr(schedules, kind)(0.0, 0.8, begin, end, frequency=frequency)
        assert _updates(ours) == _updates_of_tfmot(theirs) == [*range(begin, end + 1, frequency)]


def test_the_end_is_reached_where_it_does_not():
    """The reason for the rule: tfmot's last update is at step 900, with a sparsity of .7992."""
    arguments = {"begin_step": 0, "end_step": 990, "frequency": 100}
    theirs = schedules.PolynomialDecay(0.0, 0.8, **arguments)
    ours = schedules.Polynomial(0.0, 0.8, **arguments)
    assert _updates_of_tfmot(theirs) == [*range(0, 1000, 100)]
    assert float(theirs(900)[1]) < 0.7995 and float(ours(900)[1]) == float(theirs(900)[1])
    assert _updates(ours) == [*range(0, 1000, 100), 990]
    assert float(ours(990)[1]) == np.float32(0.8)


def test_a_short_range():
    """A frequency of more steps than there are: tfmot, whose first batch is 1, never prunes."""
    assert _updates(schedules.Linear(0.0, 0.8, 0, 60), range(1, 500)) == [60]
    theirs = schedules.PolynomialDecay(0.0, 0.8, 0, 60)
    assert _updates_of_tfmot(theirs) == [0]


def test_constant():
    assert _updates(schedules.Constant(0.5, 1, frequency=300)) == [1, 301, 601, 901]
    endless = schedules.ConstantSparsity(0.5, 1, frequency=300)
    assert _updates_of_tfmot(endless) == [1, 301, 601, 901]
    assert _updates(schedules.Constant(0.5, 1, 500, frequency=300)) == [1, 301, 500]


def test_stepwise_prunes_when_a_round_begins():
    schedule = schedules.Stepwise(0.0, 0.9, 10, 100, rounds=3, frequency=10**6)
    assert _updates(schedule) == [10, 11, 41, 71, 100]
    schedule = schedules.Stepwise(0.0, 0.9, 10, 100, rounds=3, frequency=40)
    assert _updates(schedule) == [10, 11, 41, 50, 71, 90, 100]
    # No border is missed where rounds and steps do not divide.
    uneven = schedules.Stepwise(0.0, 0.9, 0, 10, rounds=4, frequency=10**6)
    assert _updates(uneven) == [0, 1, 3, 6, 8, 10]
    assert len(np.unique(uneven.curve(_updates(uneven))[1])) == 5


def test_dense_sparse_dense_reaches_its_peak():
    schedule = schedules.DenseSparseDense(0.0, 0.9, 10, 210, frequency=60)
    assert _updates(schedule) == [10, 70, 110, 130, 190, 210]
    assert float(schedule(110)[1]) == np.float32(0.9)
    odd = schedules.DenseSparseDense(0.0, 0.9, 0, 7)
    assert _updates(odd) == [0, 3, 7]
    assert schedules.DenseSparseDense(0.0, 0.9, 0, 2).curve(range(3))[1].tolist() == [
        0, np.float32(0.9), 0,
    ]  # fmt: skip


def test_per_epoch_after_the_last():
    schedule = schedules.PerEpoch([0.5], steps_per_epoch=1)
    assert _updates(schedule) == [1] and float(schedule(900)[1]) == 0.5
    endless = schedules.PerEpoch(schedules.Constant(0.5, 2, frequency=3), steps_per_epoch=10)
    assert _updates(endless, range(100)) == [21, 51, 81]


def test_fixed_never_updates():
    updates, sparsities = schedules.Fixed(0.25).curve(range(500))
    assert not updates.any() and (sparsities == 0.25).all()
    assert schedules.Fixed().curve([3])[1].tolist() == [0]


def test_a_curve_of_ones_own():
    schedule = Square(0.0, 0.5, 0, 10, frequency=4)
    updates, sparsities = schedule.curve([0, 4, 5, 8, 10])
    assert updates.tolist() == [True, True, False, True, True]
    assert sparsities[2] == 0.125 and sparsities[-1] == 0.5
    assert repr(schedule) == (
        "Square(initial_sparsity=0.0, final_sparsity=0.5, begin_step=0, end_step=10, frequency=4)"
    )
