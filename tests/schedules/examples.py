"""One or more of every schedule, for tests that go over all."""

from __future__ import annotations

import keras

from tfprune import schedules


@keras.saving.register_keras_serializable(package="tests")
class Square(schedules.Ramp):
    """A user's own curve, as the documentation shows it."""

    def fraction(self, p):
        return p * p


RAMPS = [
    schedules.Polynomial(0.0, 0.9, 100, 1300, power=3, frequency=100),
    schedules.Polynomial(0.5, 0.8, 0, 999, power=0.5, frequency=10),
    schedules.Linear(0.1, 0.7, 1, 1000, frequency=7),
    schedules.Cosine(0.0, 0.9, 0, 1000),
    schedules.Exponential(0.3, 0.99, 50, 1000),
    schedules.OneCycle(0.2, 0.9, 10, 1000, alpha=10, beta=4.5),
    schedules.Stepwise(0.1, 0.9, 10, 1000, rounds=7),
    Square(0.0, 0.6, 3, 700, frequency=50),
]
ALL = [
    *RAMPS,
    schedules.Linear(0.8, 0.2, 0, 1000),
    schedules.Constant(0.5, 3),
    schedules.Constant(0.5, 0, 120, frequency=50),
    schedules.DenseSparseDense(0.1, 0.8, 20, 1000),
    schedules.PerEpoch([0.1, 0.5, 0.3], steps_per_epoch=50),
    schedules.PerEpoch(schedules.Cosine(0.0, 0.5, 1, 10, frequency=1), steps_per_epoch=50),
    schedules.PerEpoch(schedules.PolynomialDecay(0.0, 0.5, 1, 10, frequency=3), 50),
    schedules.PerEpoch(schedules.ConstantSparsity(0.4, 1, frequency=2), 50),
    schedules.Fixed(0.25),
]


def name_of(schedule) -> str:
    return type(schedule).__name__
