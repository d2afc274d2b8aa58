"""Schedules as dictionaries: every class there and back, own ones, and files from elsewhere."""

from __future__ import annotations

import json
import sys

import keras
import numpy as np
import pytest

from tests.schedules.examples import ALL, Square, name_of
from tfprune import schedules
from tfprune.errors import ArgumentError
from tfprune.schedules import deserialize, serialize


class Flat(schedules.PruningSchedule):
    """A user's own, configured as Keras objects are."""

    def __init__(self, level):
        self.level = level

    def __call__(self, step):
        return step > 0, self.level

    def get_config(self):
        return {"level": self.level}


class Nested(Flat):
    """A user's own, configured as tfmot's are."""

    def get_config(self):
        return {"class_name": "Nested", "config": {"level": self.level}}


class PolynomialDecay(Flat):
    """The name of a class of tfmot."""


@pytest.mark.parametrize("schedule", ALL, ids=name_of)
def test_there_and_back(schedule):
    config = schedule.get_config()
    assert "class_name" not in config
    assert type(schedule).from_config(config) == schedule
    assert schedule.get_config() == config
    found = deserialize(json.loads(json.dumps(serialize(schedule))))
    assert type(found) is type(schedule) and found == schedule and hash(found) == hash(schedule)
    steps = range(0, 1200, 10)
    for ours, theirs in zip(found.curve(steps), schedule.curve(steps), strict=True):
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("schedule", ALL, ids=name_of)
def test_by_keras_itself(schedule):
    kept = json.loads(json.dumps(keras.saving.serialize_keras_object(schedule)))
    assert keras.saving.deserialize_keras_object(kept) == schedule
    assert deserialize(kept) == schedule


def test_names():
    assert serialize(schedules.Linear(0.0, 0.5, 1, 9)) == {
        "class_name": "tfprune>Linear",
        "config": {"initial_sparsity": 0.0, "final_sparsity": 0.5, "begin_step": 1, "end_step": 9,
                   "frequency": 100},
    }  # fmt: skip
    assert serialize(Square(0.0, 0.5, 1, 9))["class_name"] == "tests>Square"


@pytest.mark.parametrize(
    "schedule",
    [schedules.ConstantSparsity(0.5, 0, 20, 7), schedules.PolynomialDecay(0.1, 0.5, 2, 10, 4, 7)],
)
def test_tfmot(schedule):
    kept = serialize(schedule)
    # tfmot's own form, so what its wrapper has saved can be read too.
    assert kept == schedule.get_config() == json.loads(json.dumps(kept))
    found = deserialize(kept)
    assert type(found) is type(schedule) and found.get_config() == schedule.get_config()


@pytest.mark.parametrize("kind", [Flat, Nested])
def test_own_classes(kind):
    kept = serialize(kind(0.5))
    assert kept == {"class_name": kind.__name__, "config": {"level": 0.5}}
    found = deserialize(kept, {kind.__name__: kind})
    assert type(found) is kind and found.level == 0.5
    with keras.saving.custom_object_scope({kind.__name__: kind}):
        assert type(deserialize(kept)) is kind
    with pytest.raises(ArgumentError, match=f"'{kind.__name__}'.*custom_objects.*register_keras"):
        deserialize(kept)
    with pytest.raises(ArgumentError, match="a known one of your own"):
        deserialize(kept, {"Other": kind})


def test_a_registered_class_is_found_by_its_short_name():
    """Registered where the file was written, not where it is read."""
    kept = {"class_name": "elsewhere>Flat", "config": {"level": 1}}
    assert type(deserialize(kept, {"Flat": Flat})) is Flat
    # But the full name counts first.
    own = {"Cosine": Flat, "tfprune>Linear": Flat}
    assert type(deserialize(serialize(schedules.Cosine(0.0, 0.5, 0, 9)), own)) is schedules.Cosine


def test_own_classes_by_epochs():
    schedule = schedules.PerEpoch(Nested(0.5), 10)
    kept = json.loads(json.dumps(serialize(schedule)))
    assert kept["config"]["sparsities"] == {"class_name": "Nested", "config": {"level": 0.5}}
    found = deserialize(kept, {"Nested": Nested})
    assert type(found.sparsities) is Nested and found == schedule
    with pytest.raises(ArgumentError, match="'Nested'"):
        deserialize(kept)


def test_a_name_that_tfmot_has():
    with pytest.raises(ArgumentError, match=r"a name of its own.*Rename it, or register"):
        serialize(PolynomialDecay(0.5))


def test_numpy_goes_into_json():
    kept = serialize(Flat({"a": np.float32(0.5), "b": np.arange(2), "c": (1, 2)}))
    assert kept["config"] == {"level": {"a": 0.5, "b": [0, 1], "c": [1, 2]}}


@pytest.mark.parametrize("level", [float("nan"), print, {1, 2}, b"x", object()])
def test_no_code_in_a_configuration(level):
    with pytest.raises(ArgumentError, match=r"get_config\(\) of Flat to hold numbers"):
        serialize(Flat(level))


@pytest.mark.parametrize("schedule", [None, "Cosine", 0.5, schedules.Cosine, {"class_name": "x"}])
def test_not_a_schedule(schedule):
    with pytest.raises(ArgumentError, match="Expected a PruningSchedule"):
        serialize(schedule)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "Expected a dictionary.*Received: None"),
        ("Cosine", "Expected a dictionary"),
        ({"class_name": "tfprune>Cosine"}, "Expected a dictionary"),
        ({"class_name": "tfprune>Cosine", "config": []}, "Expected a dictionary"),
        ({"class_name": "Cosine", "config": {}}, "'Cosine'.*custom_objects"),
        ({"class_name": ["x"], "config": {}}, r"\['x'\]"),
        ({"config": {}}, "None"),
        ({"class_name": "os.system", "config": {"command": "true"}}, "'os.system'"),
        ({"class_name": "tests>NotASchedule", "config": {}}, "to be a subclass of PruningSchedule"),
        ({"class_name": "tfprune>Cosine", "config": {"x": 1}}, "arguments of tfprune>Cosine"),
        ({"class_name": "PolynomialDecay", "config": {}}, "arguments of PolynomialDecay"),
        ({"class_name": "ConstantSparsity", "config": {"target_sparsity": 2, "begin_step": 0}},
         r"arguments of ConstantSparsity.*\[0,1\)"),
        ({"class_name": "tfprune>Fixed", "config": {"sparsity": 2}}, "sparsity to be a fraction"),
    ],
)  # fmt: skip
def test_damaged_and_foreign_files(config, words):
    with pytest.raises(ArgumentError, match=words):
        deserialize(config)


@keras.saving.register_keras_serializable(package="tests")
def NotASchedule(**arguments):
    raise AssertionError("called by a file")


def test_a_file_imports_nothing(tmp_path, monkeypatch):
    """Keras's own form names a module; it is not looked at."""
    (tmp_path / "named_by_a_file.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    config = {"module": "named_by_a_file", "class_name": "Evil", "registered_name": None,
              "config": {}}  # fmt: skip
    with pytest.raises(ArgumentError, match="'Evil'"):
        deserialize(config)
    assert "named_by_a_file" not in sys.modules


def test_equality():
    one = schedules.Linear(0.0, 0.5, 0, 10)
    assert one == schedules.Linear(0, 0.5, 0, 10, frequency=100)
    assert one != schedules.Linear(0.0, 0.5, 0, 11) and one != schedules.Cosine(0.0, 0.5, 0, 10)
    assert one != "Linear" and len({one, schedules.Linear(0.0, 0.5, 0, 10)}) == 1
    integer, real = (schedules.Polynomial(0.0, 0.5, 0, 10, power=p) for p in (3, 3.0))
    assert integer == real and hash(integer) == hash(real)


def test_repr():
    inner = schedules.Fixed(0.5)
    assert repr(schedules.PerEpoch(inner, 10)) == (
        "PerEpoch(sparsities=Fixed(sparsity=0.5), steps_per_epoch=10)"
    )
    for schedule in ALL:
        if isinstance(schedule, schedules.Periodic):
            assert eval(repr(schedule), {**vars(schedules), "Square": Square}) == schedule


def test_an_argument_that_is_not_kept():
    class Forgetful(schedules.Schedule):
        def __init__(self, level, *rest, **more):
            self._level = level

        def sparsity_at(self, step):
            raise NotImplementedError

        updates_at = sparsity_at

    with pytest.raises(ArgumentError, match=r"Add self\.level = level"):
        Forgetful(0.5).get_config()
