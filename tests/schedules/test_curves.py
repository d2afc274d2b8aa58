"""Sparsities: published values, ends, equality with tfmot, and what holds for any arguments."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.schedules.examples import ALL, RAMPS, name_of
from tfprune import schedules
from tfprune.errors import ArgumentError

# p = 0, .1, .25, .5, .75, .9, 1 of twenty steps after step 100.
STEPS = [100, 102, 105, 110, 115, 118, 120]
# One rounding step of float32 just below 1.
ULP = 2.0**-24


@pytest.mark.parametrize(
    ("name", "expected"),
    # Computed in float64 from the papers' formulas, for sparsity 0 to .9; four digits.
    [
        ("Polynomial", [0, 0.2439, 0.5203, 0.7875, 0.8859, 0.8991, 0.9]),
        ("Linear", [0, 0.09, 0.225, 0.45, 0.675, 0.81, 0.9]),
        ("Exponential", [0, 0.2057, 0.4377, 0.6838, 0.8222, 0.8741, 0.9]),
        ("OneCycle", [0.0022, 0.0090, 0.0683, 0.6582, 0.8904, 0.8991, 0.9]),
        ("Cosine", [0, 0.0220, 0.1318, 0.4500, 0.7682, 0.8780, 0.9]),
    ],
)
def test_published_values(name, expected):
    _, sparsities = getattr(schedules, name)(0.0, 0.9, 100, 120).curve(STEPS)
    # Half of the last printed digit.
    np.testing.assert_allclose(sparsities, expected, rtol=0, atol=5e-5)


def test_dense_sparse_dense():
    _, sparsities = schedules.DenseSparseDense(0.0, 0.9, 100, 120).curve(STEPS)
    # Cosine's values at 2 p, and back: p = .1 -> .9 (1 - cos .2 pi) / 2.
    np.testing.assert_allclose(
        sparsities, [0, 0.0859, 0.45, 0.9, 0.45, 0.0859, 0], rtol=0, atol=5e-5
    )
    assert sparsities[3] == np.float32(0.9) and sparsities[-1] == 0


@pytest.mark.parametrize("peak", [0.3, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("first", [0.0, 0.1, 0.3])
def test_the_peak_is_exact(first, peak):
    """Where float32 of first + (peak - first) is not: .1 and .7, for one."""
    _, sparsities = schedules.DenseSparseDense(first, peak, 3, 1003).curve([0, 3, 503, 1003, 2000])
    assert sparsities.tolist() == np.float32([first, first, peak, first, first]).tolist()


def test_stepwise():
    schedule = schedules.Stepwise(0.0, 0.9, 100, 130, rounds=3)
    _, sparsities = schedule.curve(range(95, 140))
    expected = [0.0] * 6 + [0.3] * 10 + [0.6] * 10 + [0.9] * 19
    # 0.9 / 3 is computed in float32.
    np.testing.assert_allclose(sparsities, expected, rtol=0, atol=ULP)


@pytest.mark.parametrize("rounds", range(1, 60))
def test_stepwise_rounds_are_equal(rounds):
    """Borders in whole numbers: in float32, some of 13 rounds would begin a step early."""
    schedule = schedules.Stepwise(0.0, 0.9, 7, 7 + 13 * rounds, rounds=rounds)
    _, sparsities = schedule.curve(range(8, 8 + 13 * rounds))
    values, counts = np.unique(sparsities, return_counts=True)
    assert len(values) == rounds and set(counts) == {13}


def test_per_epoch():
    schedule = schedules.PerEpoch([0.1, 0.5, 0.3], steps_per_epoch=4)
    updates, sparsities = schedule.curve(range(15))
    expected = np.float32([0.1] * 5 + [0.5] * 4 + [0.3] * 6)
    assert sparsities.tolist() == expected.tolist()
    assert np.flatnonzero(updates).tolist() == [1, 5, 9]


def test_a_schedule_by_epochs():
    inner = schedules.Polynomial(0.2, 0.8, 1, 4, frequency=2)
    updates, sparsities = schedules.PerEpoch(inner, steps_per_epoch=5).curve(range(1, 41))
    expected = np.repeat(inner.curve(range(8))[1], 5)
    assert sparsities.tolist() == expected.tolist()
    # Epochs 1 and 3 by the frequency, 4 as the end.
    assert np.flatnonzero(updates).tolist() == [5, 15, 20]


@pytest.mark.parametrize("schedule", RAMPS, ids=name_of)
def test_both_ends_are_exact(schedule):
    begin, end = schedule.begin_step, schedule.end_step
    _, sparsities = schedule.curve([0, begin, end, end + 1, 10**12])
    first, last = np.float32(schedule.initial_sparsity), np.float32(schedule.final_sparsity)
    assert sparsities[2:].tolist() == [last] * 3
    if isinstance(schedule, schedules.OneCycle):
        # The curve's own start: (1 + e^-5.5) / (1 + e^4.5) of the way, in float64.
        start = 0.2 + 0.7 * (1 + np.exp(-5.5)) / (1 + np.exp(4.5))
        # Four roundings of float32.
        np.testing.assert_allclose(sparsities[:2], start, rtol=0, atol=4 * ULP)
    else:
        assert sparsities[:2].tolist() == [first] * 2


@pytest.mark.parametrize("kind", [schedules.Polynomial, schedules.Exponential, schedules.Cosine])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.7, 0.8, 0.9, 0.95, 0.99])
def test_ends_at_any_sparsity(kind, sparsity):
    for first, last in ((0.0, sparsity), (sparsity, 0.999), (sparsity, sparsity), (sparsity, 0.0)):
        _, found = kind(first, last, 3, 1000).curve([3, 1000])
        assert found.tolist() == np.float32([first, last]).tolist()


@pytest.mark.parametrize("kind", ["Polynomial", "Linear", "Cosine", "Exponential", "OneCycle"])
def test_a_jump(kind):
    """begin == end: tfmot divides 0 by 0 there."""
    schedule = getattr(schedules, kind)(0.25, 0.75, 5, 5)
    updates, sparsities = schedule.curve([0, 4, 5, 6])
    start = sparsities[0]
    assert kind == "OneCycle" or start == 0.25
    assert sparsities.tolist() == [start, start, 0.75, 0.75]
    assert updates.tolist() == [False, False, True, False]
    assert np.isnan(schedules.PolynomialDecay(0.25, 0.75, 5, 5)(5)[1])


@pytest.mark.parametrize(
    ("first", "last", "power"),
    [(0.0, 0.8, 3), (0.0, 0.9, 1), (0.5, 0.95, 3), (0.1, 0.9, 2), (0.3, 0.7, 0.7), (0.9, 0.2, 3)],
)
def test_polynomial_is_that_of_tfmot(first, last, power):
    """Bit for bit, at every step after the first, one by one and as an array.

    At begin_step tfmot computes (first - last) + last, which may be off by a rounding.
    """
    ours = schedules.Polynomial(first, last, 10, 250, power=power, frequency=7)
    theirs = schedules.PolynomialDecay(first, last, 10, 250, power=power, frequency=7)
    single = np.float32([[ours(i)[1], theirs(i)[1]] for i in range(270)])
    many = np.stack([s(np.arange(270))[1] for s in (ours, theirs)], axis=1)
    for found in (single, many):
        assert found[11:, 0].tolist() == found[11:, 1].tolist()
        assert set(found[:11, 0]) == {np.float32(first)}
        # Two roundings of float32, and none from 0.
        assert abs(found[:11, 1] - np.float32(first)).max() <= (2 * ULP if first else 0)


def test_polynomial_stays_in_its_range():
    """Over very many steps tfmot's rounding is larger than what two steps change."""
    arguments = {"begin_step": 0, "end_step": 10**8}
    theirs = schedules.PolynomialDecay(0.27, 0.636, **arguments)(np.asarray([1, 2]))[1].numpy()
    assert (theirs < np.float32(0.27)).all()
    _, ours = schedules.Polynomial(0.27, 0.636, **arguments).curve([1, 2])
    assert ours.tolist() == [np.float32(0.27)] * 2


def test_constant_is_that_of_tfmot():
    ours, theirs = schedules.Constant(0.3, 5, 65), schedules.ConstantSparsity(0.3, 5, 65)
    for step in (0, 5, 50, 65, 100):
        assert ours(step)[1].numpy() == theirs(step)[1].numpy() == np.float32(0.3)


@pytest.mark.parametrize(
    "step",
    [7, np.int64(7), np.int32(7), np.asarray(7), tf.constant(7), tf.constant(7, tf.int64),
     tf.Variable(7), tf.Variable(7, dtype=tf.int64), keras.Variable(7, dtype="int64"),
     keras.Variable(7, dtype="int32")],
    ids=lambda step: type(step).__name__,
)  # fmt: skip
def test_any_kind_of_step(step):
    update, sparsity = schedules.Linear(0.0, 0.5, 0, 14, frequency=7)(step)
    assert update.dtype == tf.bool and update.shape == () and bool(update)
    assert sparsity.dtype == tf.float32 and sparsity.shape == () and float(sparsity) == 0.25


@pytest.mark.parametrize("step", [1.0, True, "7", None, np.float32(2), tf.constant(2.0), 10**30])
def test_not_a_step(step):
    with pytest.raises(ArgumentError, match="step to be a whole number"):
        schedules.Fixed()(step)


def test_steps_beyond_32_bits():
    schedule = schedules.Linear(0.0, 0.5, 2**40, 2**41, frequency=2**39)
    updates, sparsities = schedule.curve([2**40 - 1, 2**40, 2**40 + 2**39, 2**41, 2**41 + 2**39])
    assert sparsities.tolist() == [0, 0, 0.25, 0.5, 0.5]
    assert updates.tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("schedule", ALL, ids=name_of)
def test_compiled(schedule):
    """A graph and XLA say what eager execution says."""
    steps = tf.range(0, 1400, 7)
    updates, sparsities = schedule(steps)
    assert updates.shape == sparsities.shape == steps.shape
    for compiled in (False, True):
        function = tf.function(schedule.__call__, jit_compile=compiled)
        found, values = function(steps)
        assert found.numpy().tolist() == updates.numpy().tolist()
        # XLA has its own pow, exp and sin, and fuses multiply-adds: some float32 roundings.
        np.testing.assert_allclose(values, sparsities, rtol=0, atol=4 * ULP)
    variable = tf.Variable(0, dtype=tf.int64)
    counted = tf.function(lambda: schedule(variable.assign_add(1)), jit_compile=True)
    for step in (1, 2, 3):
        update, value = counted()
        assert bool(update) == bool(schedule(step)[0])
        assert abs(float(value) - float(schedule(step)[1])) <= 4 * ULP


# Schedules compute in float32, which XLA and CPUs flush to zero below 1e-38.
_SPARSITY = st.floats(0, 0.9990000128746033, width=32, allow_subnormal=False)


@st.composite
def _ramps(draw):
    begin = draw(st.integers(0, 10**5))
    length = draw(st.integers(1, 10**5))
    kind, options = draw(
        st.sampled_from(
            [("Polynomial", {"power": draw(st.floats(0.1, 10))}), ("Linear", {}), ("Cosine", {}),
             ("Exponential", {}), ("OneCycle", {"alpha": 2 + draw(st.floats(0, 200)), "beta": 1.5}),
             ("Stepwise", {"rounds": draw(st.integers(1, length))})]
        )
    )  # fmt: skip
    first, last = draw(_SPARSITY), draw(_SPARSITY)
    frequency = draw(st.integers(1, 10**4))
    make = getattr(schedules, kind)
    return make(first, last, begin, begin + length, frequency=frequency, **options)


@settings(max_examples=150, deadline=None)
@given(_ramps(), st.integers(0, 10**6))
def test_any_ramp(schedule, later):
    begin, end = schedule.begin_step, schedule.end_step
    first, last = np.float32([schedule.initial_sparsity, schedule.final_sparsity])
    steps = np.unique(np.linspace(max(begin - 3, 0), end + 3, 300).astype(np.int64))
    updates, sparsities = schedule.curve(steps)
    assert sparsities.dtype == np.float32
    assert min(first, last) <= sparsities.min() and sparsities.max() <= max(first, last)
    # Monotone, but for float32 roundings of pow, exp and sin.
    assert (np.sign(last - first) * np.diff(sparsities) >= -4 * ULP).all()
    # Pure: the same answer again, whatever was asked in between.
    again, same = schedule.curve(steps)
    assert (again == updates).all() and (same == sparsities).all()
    # The last update is at the end, and it has the final sparsity.
    update, value = schedule.curve([end, end + 1 + later])
    assert update.tolist() == [True, False] and value.tolist() == [last, last]
    assert not updates[steps < begin].any() and not updates[steps > end].any()
