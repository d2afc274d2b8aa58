"""What training-time methods for channels share."""

from __future__ import annotations

import csv
from dataclasses import dataclass

import keras
import numpy as np
import pytest

import tfprune
from tests.methods.models import residual, stir, stripes
from tfprune.cost import measure
from tfprune.criteria.scores import Scores
from tfprune.graph.blocks import blocks_of
from tfprune.graph.plan import PruningPlan
from tfprune.layers.updates import MethodUpdate
from tfprune.methods import StructuredMethod
from tfprune.methods.structured import difference, macs_left, widths_left


@dataclass(frozen=True)
class ByNumber(StructuredMethod):
    """The last channels of every group are worth nothing."""

    worthless: int = 2

    def update(self):
        return MethodUpdate()

    def scores(self, graph):
        values = {g.name: np.arange(g.width, 0.0, -1) - self.worthless for g in graph.prunable}
        return Scores(values, "number")


def test_the_threshold_decides_where_nothing_is_asked_for() -> None:
    plan = ByNumber().plan(ByNumber().prepare(residual()))
    assert {name: len(kept) for name, kept in plan.kept.items()} == {
        "stem": 6, "first": 4, "last": 8,
    }  # fmt: skip
    assert plan.notes["method"] == "ByNumber()"
    wide = ByNumber(worthless=99, min_channels=3, ignore=["last"])
    plan = wide.plan(wide.prepare(residual()))
    assert {name: len(kept) for name, kept in plan.kept.items()} == {"stem": 3, "first": 3}
    rounded = ByNumber(worthless=3, round_to=4)
    plan = rounded.plan(rounded.prepare(residual()))
    # 5 of 8, 3 of 6 and 7 of 10 worth something, in multiples of 4
    assert {name: len(kept) for name, kept in plan.kept.items()} == {"first": 4, "last": 8}


def test_macs_that_are_left() -> None:
    method = ByNumber(macs=0.4)
    source = residual()
    model = method.prepare(source)
    graph, plan = tfprune.analyse(model), method.plan(model)
    small = method.finish(model)
    # counted on the plan and on the network
    assert macs_left(graph, plan) == measure(small).macs / measure(source).macs <= 0.4


def test_difference_is_relative_to_the_largest_output() -> None:
    model = stir(residual())
    x, y = stripes(16)
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    other.get_layer("head").bias.assign(np.add(model.get_layer("head").bias, [0, 0.5, 0]))
    largest = np.abs(model.predict(x, verbose=0)).max()
    # 0.5 is added exactly, but for the rounding of float32 outputs
    np.testing.assert_allclose(difference(model, other, (x, y)), 0.5 / largest, rtol=1e-5)
    assert difference(model, model, (x, y)) == 0


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A training that writes to TensorBoard and to a table."""
    folder = tmp_path_factory.mktemp("logs")
    method = tfprune.methods.NetworkSlimming(0.05, macs=0.5)
    model = method.prepare(stir(residual()))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    watching = [keras.callbacks.TensorBoard(folder), keras.callbacks.CSVLogger(folder / "log.csv")]
    model.fit(
        *stripes(32), batch_size=16, epochs=2, verbose=0,
        callbacks=[*method.callbacks(), *watching],
    )  # fmt: skip
    return folder, method.plan(model)


def test_tensorboard_and_tables_show_the_structure(logged) -> None:
    folder, plan = logged
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "train"), {"tensors": 0})
    events.Reload()
    tags = set(events.Tags()["tensors"])
    assert {
        "epoch_macs", "epoch_channels", "epoch_width/stem", "epoch_width/first",
        "epoch_width/last", "epoch_mean_scale",
    } <= tags  # fmt: skip
    (*_, last) = events.Tensors("epoch_width/last")
    from tensorboard.util.tensor_util import make_ndarray

    kept = len(plan.kept.get("last", range(10)))
    assert last.step == 1 and float(make_ndarray(last.tensor_proto)) == kept
    with open(folder / "log.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and float(rows[1]["macs"]) <= 0.5
    assert float(rows[1]["width/last"]) == kept


def test_widths_inside_a_block_that_goes() -> None:
    """Its own groups are gone; the stream that it adds to stays."""
    graph = tfprune.analyse(residual())
    (block,) = blocks_of(graph)
    plan = PruningPlan.of(graph, {"stem": range(5), "first": range(2)}, blocks=[block.name])
    assert widths_left(graph, plan) == {"stem": 5, "first": 0, "last": 10}
    whole = PruningPlan.of(graph, {"stem": range(5), "first": range(2)})
    assert widths_left(graph, whole) == {"stem": 5, "first": 2, "last": 10}
