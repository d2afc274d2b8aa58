"""What is refused, and in which words."""

from __future__ import annotations

import numpy as np
import pytest

from tfprune import schedules as s
from tfprune.errors import ArgumentError

NAN = float("nan")
KINDS = [s.Polynomial, s.Linear, s.Cosine, s.Exponential, s.OneCycle, s.DenseSparseDense]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"begin_step": -1}, r"begin_step to be a whole number, 0 or more\. Received: -1"),
        ({"begin_step": 1.0}, r"begin_step to be a whole number.*Received: 1\.0"),
        ({"begin_step": True}, "begin_step to be a whole number.*Received: True"),
        ({"begin_step": "0"}, "begin_step to be a whole number.*Received: '0'"),
        ({"end_step": 9, "begin_step": 10},
         "begin_step 10, end_step 9: pruning would end before it begins"),
        ({"end_step": -1}, r"Received: -1 \(without end\).*take Constant"),
        ({"end_step": -2}, "end_step to be a whole number, 0 or more.*Received: -2"),
        ({"end_step": 0}, "end_step to be 1 or more.*first training batch is step 1"),
        ({"end_step": np.True_}, "end_step to be a whole number"),
        ({"frequency": 0}, "frequency to be a whole number, 1 or more.*Received: 0"),
        ({"frequency": -5}, "Received: -5"),
        ({"frequency": 2.5}, "Received: 2.5"),
    ],
)  # fmt: skip
def test_steps(kind, steps, words):
    arguments = {"begin_step": 0, "end_step": 100, "frequency": 10, **steps}
    with pytest.raises(ArgumentError, match=words):
        kind(0.0, 0.8, **arguments)


@pytest.mark.parametrize("sparsity", [1.0, 1, -0.1, 80, NAN, float("inf"), "0.5", None, True,
                                      1 - 1e-9])  # fmt: skip
def test_sparsities(sparsity):
    """1 - 1e-9 is 1 in float32."""
    for make in (
        *(lambda kind=kind: kind(sparsity, 0.9, 0, 100) for kind in KINDS),
        *(lambda kind=kind: kind(0.0, sparsity, 0, 100) for kind in KINDS),
        lambda: s.Stepwise(0.0, sparsity, 0, 100, rounds=2),
        lambda: s.Constant(sparsity, 0),
        lambda: s.Fixed(sparsity),
        lambda: s.PerEpoch([0.0, sparsity], 10),
    ):
        with pytest.raises(ArgumentError, match=r"_?sparsit.* fraction of zeros.*Received: .*0\.8"):
            make()


def test_the_argument_is_named():
    with pytest.raises(ArgumentError, match="initial_sparsity"):
        s.Cosine(2, 0.9, 0, 100)
    with pytest.raises(ArgumentError, match="final_sparsity"):
        s.Cosine(0.0, 2, 0, 100)
    with pytest.raises(ArgumentError, match="peak_sparsity"):
        s.DenseSparseDense(0.0, 2, 0, 100)
    with pytest.raises(ArgumentError, match=r"sparsities\[1\]"):
        s.PerEpoch([0.0, 2], 10)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: s.Constant(0.5, 3, 2), "pruning would end before it begins"),
        (lambda: s.Constant(0.5, 0, 0), "masks would never be updated"),
        (lambda: s.Constant(0.5, 0, -2), r"end_step \(or -1, without end\)"),
        (lambda: s.Polynomial(0.0, 0.5, 0, 10, power=0), "power to be a number above 0"),
        (lambda: s.Polynomial(0.0, 0.5, 0, 10, power=NAN), "power to be a number above 0"),
        (lambda: s.OneCycle(0.0, 0.5, 0, 10, alpha=0), "alpha to be a number above 0"),
        (lambda: s.OneCycle(0.0, 0.5, 0, 10, beta=-1), "beta to be a number above 0"),
        (lambda: s.OneCycle(0.0, 0.5, 0, 10, alpha=6, beta=14), "alpha 6, beta 14.*14 and 6"),
        (lambda: s.OneCycle(0.0, 0.5, 0, 10, alpha=float("inf")), "Received: inf"),
        (lambda: s.Stepwise(0.0, 0.5, 0, 10, rounds=0), "rounds to be a whole number, 1 or more"),
        (lambda: s.Stepwise(0.0, 0.5, 0, 10, rounds=11), "rounds 11 in 10 steps"),
        (lambda: s.DenseSparseDense(0.5, 0.4, 0, 10), "not to be below initial_sparsity"),
        (lambda: s.DenseSparseDense(0.0, 0.4, 3, 4), "at least 2 after begin_step"),
        (lambda: s.PerEpoch([], 10), r"list with a fraction.*Received: \[\]"),
        (lambda: s.PerEpoch(np.zeros(0), 10), r"Received: \[\]"),
        (lambda: s.PerEpoch(0.5, 10), "Received: 0.5"),
        (lambda: s.PerEpoch("0.5", 10), "Received: '0.5'"),
        (lambda: s.PerEpoch(np.zeros((2, 2)), 10), r"sparsities\[0\]"),
        (lambda: s.PerEpoch([0.5], 0), "steps_per_epoch to be a whole number, 1 or more"),
        (lambda: s.PerEpoch(s.Cosine(0.0, 0.8, 0, 10), 50),
         "frequency of 100 in 10 epochs.*frequency=1"),
        (lambda: s.Fixed().plot(0), "steps to be a whole number, 1 or more"),
        (lambda: s.Fixed().plot(2.5), "Received: 2.5"),
    ],
)  # fmt: skip
def test_refused(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()


def test_numpy_numbers_become_plain_ones():
    schedule = s.Polynomial(
        np.float32(0), np.float64(0.5), np.int64(0), np.int32(10), power=np.int64(2)
    )
    assert schedule == s.Polynomial(0.0, 0.5, 0, 10, power=2)
    kinds = [type(value) for value in schedule.get_config().values()]
    assert kinds == [float, float, int, int, int, int]


def test_arguments_in_the_order_of_tfmot():
    assert (
        s.Polynomial(0.1, 0.5, 2, 10, 4, 7).get_config()
        == (s.PolynomialDecay(0.1, 0.5, 2, 10, 4, 7).get_config()["config"])
    )
    assert (
        s.Polynomial(0.1, 0.5, 2, 10).get_config()
        == (s.PolynomialDecay(0.1, 0.5, 2, 10).get_config()["config"])
    )
    assert (
        s.Constant(0.5, 2, 10, 7).get_config()
        == (s.ConstantSparsity(0.5, 2, 10, 7).get_config()["config"])
    )
    assert s.Constant(0.5, 2).get_config() == s.ConstantSparsity(0.5, 2).get_config()["config"]


def test_sparsity_may_fall():
    """As in tfmot: masks open again."""
    _, sparsities = s.Exponential(0.75, 0.0, 0, 2).curve([0, 1, 2])
    # Half of the pruned weights' share of the density, in the geometric mean: 1 - sqrt(.25).
    # Two roundings of float32.
    np.testing.assert_allclose(sparsities, [0.75, 0.5, 0.0], rtol=0, atol=2 * 2.0**-24)
