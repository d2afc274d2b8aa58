"""Pictures of schedules."""

from __future__ import annotations

import numpy as np
import pytest

from tests.schedules.examples import ALL, name_of
from tfprune import schedules


def test_the_curve_and_its_updates():
    schedule = schedules.Linear(0.0, 0.8, 0, 100, frequency=40)
    (axes,) = schedule.plot().axes
    (line,) = axes.lines
    # A tenth more than the schedule takes.
    assert line.get_xdata().tolist() == [*range(111)]
    assert line.get_ydata().tolist() == schedule.curve(range(111))[1].tolist()
    assert line.get_markevery() == [0, 40, 80, 100] and line.get_marker() == "o"
    assert line.get_label() == "Linear"


@pytest.mark.parametrize(
    ("schedule", "last"),
    [
        (schedules.Linear(0.0, 0.8, 10, 12), 13),
        (schedules.Constant(0.5, 3, frequency=20), 203),
        (schedules.Fixed(), 100),
        (schedules.PerEpoch([0.1, 0.2], 30), 60),
        (schedules.PerEpoch(schedules.Linear(0.0, 0.5, 0, 10, frequency=1), 30), 330),
        (schedules.PerEpoch(schedules.ConstantSparsity(0.5, 0), 30), 300),
        (schedules.PerEpoch(schedules.PolynomialDecay(0.0, 0.5, 0, 20, frequency=1), 30), 630),
    ],
    # not by repr: that of tfmot's schedules has an address in it, and every worker another
    ids=lambda value: str(value) if isinstance(value, int) else name_of(value),
)
def test_how_far(schedule, last):
    assert schedule.plot().axes[0].lines[0].get_xdata()[-1] == last


def test_chosen_steps():
    schedule = schedules.Linear(0.0, 0.8, 0, 100, frequency=10)
    assert schedule.plot(20).axes[0].lines[0].get_xdata().tolist() == [*range(21)]
    for steps in ([5, 10, 30], np.asarray([5, 10, 30]), range(5, 31, 5)):
        line = schedule.plot(steps).axes[0].lines[0]
        assert line.get_xdata().tolist() == list(steps)
        assert [steps[i] for i in line.get_markevery()] == [s for s in steps if s % 10 == 0]


@pytest.mark.parametrize("schedule", ALL, ids=name_of)
def test_every_schedule_can_be_drawn(schedule):
    line = schedule.plot().axes[0].lines[0]
    updates = schedule.curve(line.get_xdata())[0]
    assert line.get_markevery() == np.flatnonzero(updates).tolist()
