"""Latency tables: interpolation, lookups by widths, files; one measurement for real."""

import json

import keras
import numpy as np
import pytest

import tfprune
from tests import toys
from tfprune.errors import ArgumentError, ModelError
from tfprune.litert import LatencyTable, LayerTable, latency_table


def network():
    layers = keras.layers
    inputs = keras.Input((6, 6, 3), name="image")
    x = layers.Conv2D(8, 3, padding="same", name="stem")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    y = layers.Conv2D(16, 1, name="inner")(x)
    x = layers.Add(name="sum")([x, layers.Conv2D(8, 1, name="outer")(y)])
    x = layers.Flatten(name="flat")(x)
    return keras.Model(inputs, layers.Dense(5, name="head")(x), name="network")


@pytest.fixture(scope="module")
def measured():
    model = network()
    return model, latency_table(model, step=8, runs=2)


def made_up(table: LatencyTable) -> LatencyTable:
    """The same grid with known times: inputs + 100 outputs."""
    layers = {
        name: LayerTable(
            name, t.inputs, t.outputs, np.add.outer(t.inputs, 100.0 * np.array(t.outputs))
        )
        for name, t in table.layers.items()
    }
    return LatencyTable(layers, 7.0, 1, "made up")


def test_linear_between_the_points():
    table = LayerTable("layer", (8, 16), (4, 8, 12), np.array([[1.0, 2.0, 4.0], [3.0, 4.0, 8.0]]))
    assert table(8, 4) == 1.0
    assert table(16, 12) == 8.0
    assert table(12, 8) == 3.0  # (2 + 4) / 2
    assert table(8, 10) == 3.0  # (2 + 4) / 2
    assert table(10, 6) == pytest.approx(0.75 * 1.5 + 0.25 * 3.5)
    for inputs, outputs in ((7, 4), (17, 4), (8, 3), (8, 13)):
        with pytest.raises(ArgumentError, match="inside the table"):
            table(inputs, outputs)


def test_every_layer_is_on_the_grid(measured):
    model, table = measured
    kinds = {name.split("(")[0] for name in table.layers}
    assert kinds == {"Conv2D", "DepthwiseConv2D", "Dense"}
    assert all((t.latency_ms > 0).all() for t in table.layers.values())
    # Dense, and everything at its narrowest: 1 channel.
    graph = tfprune.analyse(model)
    latency = table.cost(graph)
    narrow = graph.keep_mask({group.name: [0] for group in graph.prunable})
    assert np.isfinite(latency(narrow))
    assert table.threads == 1


def test_a_lookup_counts_what_is_kept(measured):
    model, table = measured
    graph = tfprune.analyse(model)
    latency = made_up(table).cost(graph)
    # inputs + 100 outputs of every layer that multiplies; a depthwise layer has no outputs entry.
    dense = (3 + 800) + 8 + (8 + 1600) + (16 + 800) + (6 * 6 * 8 + 500)
    assert latency(np.ones(len(graph.solution.frozen), bool)) == 7 + dense
    # Four of 16 channels less: inner's outputs and outer's inputs.
    mask = graph.keep_mask({"inner": np.arange(12)})
    assert latency(mask) == pytest.approx(7 + dense - (400 + 4))
    # Two of the stream's 8 less: the outputs of stem and outer, what depthwise and inner read, and
    # 36 rows each of the head.
    mask = graph.keep_mask({"stem": np.arange(6)})
    assert latency(mask) == pytest.approx(7 + dense - (200 + 2 + 2 + 200 + 72))


def test_the_pruned_model_costs_what_its_mask_does(measured):
    model, table = measured
    graph = tfprune.analyse(model)
    plan = tfprune.plan(model, 0.5, round_to=1)
    small = tfprune.analyse(plan.apply(model))
    table = made_up(table)
    whole = np.ones(len(small.solution.frozen), bool)
    assert table.cost(small)(whole) == pytest.approx(table.cost(graph)(graph.keep_mask(plan.kept)))


def test_files(measured, tmp_path):
    _, table = measured
    path = tmp_path / "table.json"
    table.save(path)
    again = LatencyTable.load(path)
    assert again.layers.keys() == table.layers.keys()
    for name, layer in table.layers.items():
        np.testing.assert_array_equal(again.layers[name].latency_ms, layer.latency_ms)
    assert (again.overhead_ms, again.threads) == (table.overhead_ms, table.threads)
    document = json.loads(path.read_text())
    next(iter(document["layers"].values()))["latency_ms"].append([1])
    path.write_text(json.dumps(document))
    with pytest.raises(ArgumentError, match=r"latency table as LatencyTable\.save"):
        LatencyTable.load(path)


def test_refusals(measured):
    _, table = measured
    with pytest.raises(ArgumentError, match="table of this model's layers"):
        table.cost(tfprune.analyse(toys.chain()))
    with pytest.raises(ArgumentError, match="step of at least 1"):
        latency_table(toys.chain(), step=0)
    inputs = keras.Input((6, 8), name="tokens")
    x = keras.layers.MultiHeadAttention(4, 4, name="attention")(inputs, inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, name="head")(x))
    with pytest.raises(ModelError, match=r"MultiHeadAttention at 'attention'"):
        latency_table(model)
