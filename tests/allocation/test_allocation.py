"""How many channels go: ratios, one ranking, budgets, rounding; and what cannot be had."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tfprune
from tests import toys
from tfprune.allocation import PRESETS, allowed_widths, kept_count, multiple
from tfprune.cost import CostModel, measure
from tfprune.criteria.scores import Scores


def widths(plan, model):
    return {g.name: len(plan.kept.get(g.name, range(g.width))) for g in tfprune.analyse(model)}


@pytest.fixture(scope="module")
def model():
    return toys.chain(widths=(16, 24, 40))


@pytest.mark.parametrize(
    ("width", "ratio", "kept"),
    # Reference: kept = int(width (1 - ratio)) of the L1 and Rethinking codes, safe at 10 (1 - .9).
    [(64, 0.3, 44), (128, 0.3, 89), (16, 0.6, 6), (16, 0.1, 14), (64, 0.1, 57), (10, 0.9, 1),
     (16, 0.5, 8), (1, 0.99, 1), (5, 0.0, 5)],
)  # fmt: skip
def test_kept_count(width, ratio, kept):
    assert kept_count(width, ratio) == kept


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 32))
def test_allowed_widths(width, minimum, step):
    allowed = allowed_widths(width, min(minimum, width), step)
    assert allowed[0] == width
    assert allowed == sorted(set(allowed), reverse=True)
    for other in allowed[1:]:
        assert min(minimum, width) <= other < width
        assert other % step == 0 or width < step


def test_uniform_ratio_rounds_up(model):
    assert widths(tfprune.plan(model, 0.5, round_to=1), model) == {
        "conv0": 8, "conv1": 12, "conv2": 20, "head": 5,
    }  # fmt: skip
    assert widths(tfprune.plan(model, 0.5, round_to=8), model) == {
        "conv0": 8, "conv1": 16, "conv2": 24, "head": 5,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("heads", "width", "kept"),
    # Of half the heads: any number of them is a multiple of 8 positions; pairs are; only 8 are.
    [(12, 64, 6), (6, 8, 3), (12, 12, 6), (10, 12, 6), (16, 3, 8), (12, 3, 8), (7, 3, 3)],
)
def test_heads_count_with_their_width(heads, width, kept):
    inputs = keras.Input((5, 16))
    attention = keras.layers.MultiHeadAttention(heads, width, name="attention")
    outputs = keras.layers.Dense(2)(keras.layers.Flatten()(attention(inputs, inputs)))
    model = keras.Model(inputs, outputs)
    assert tfprune.analyse(model)["attention:heads"].inner == width
    small = tfprune.prune(model, {"attention:heads": 0.5}, round_to=8)
    assert small.get_layer("attention").num_heads == kept
    assert tfprune.verify(model, tfprune.plan(model, {"attention:heads": 0.5}), pruned=small)


def test_heads_made_by_an_einsum():
    inputs = keras.Input((5, 16))
    x = keras.layers.EinsumDense("abc,cde->abde", output_shape=(5, 6, 4), name="project")(inputs)
    x = keras.layers.EinsumDense("abde,def->abf", output_shape=(5, 7), name="merge")(x)
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)))
    inner = {group.width: group.inner for group in tfprune.analyse(model) if group.prunable}
    assert inner == {6: 4, 4: 1, 7: 1}


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets(model, name):
    assert multiple(name) == PRESETS[name]
    plan = tfprune.plan(model, 0.5, round_to=name)
    for group, kept in plan.kept.items():
        assert len(kept) % PRESETS[name] == 0 or plan.widths[group] < PRESETS[name]


def test_ratio_by_name_and_pattern(model):
    plan = tfprune.plan(model, {"conv*": 0.5, "conv1": 0.25}, round_to=1)
    assert widths(plan, model) == {"conv0": 8, "conv1": 18, "conv2": 20, "head": 5}


def test_ignore_and_minimum(model):
    plan = tfprune.plan(model, 0.9, round_to=1, ignore=["conv1"], min_channels=4)
    assert widths(plan, model) == {"conv0": 4, "conv1": 24, "conv2": 4, "head": 5}
    plan = tfprune.plan(model, 0.9, round_to=1, max_pruning_ratio=0.5)
    assert widths(plan, model) == {"conv0": 8, "conv1": 12, "conv2": 20, "head": 5}


@pytest.mark.parametrize("order", ["uniform", "global"])
@pytest.mark.parametrize("round_to", [1, 4, 8])
@pytest.mark.parametrize("budget", [{"macs": 0.5}, {"params": 0.3}, {"size_bytes": 20_000},
                                    {"macs": 0.6, "params": 0.4}])  # fmt: skip
def test_budget_is_met_within_one_step(model, order, round_to, budget):
    plan = tfprune.plan(model, order=order, round_to=round_to, **budget)
    graph = tfprune.analyse(model)
    costs = CostModel(graph)
    functions = {"macs": costs.macs, "params": costs.parameters, "size_bytes": costs.size_bytes}
    dense, mask = costs.full_mask(), costs.mask(plan)
    limits = {
        name: value * functions[name](dense) if isinstance(value, float) else value
        for name, value in budget.items()
    }
    assert all(functions[name](mask) <= limit for name, limit in limits.items())

    # One step back, in whichever group, would break a limit.
    def with_one_step_back(group):
        kept = dict(plan.kept)
        missing = sorted(set(range(group.width)) - set(kept[group.name]))
        step = 1 if group.width < round_to else round_to
        room = len(kept[group.name]) % step
        kept[group.name] = (*kept[group.name], *missing[: step - room])
        return costs.graph.keep_mask(kept)

    assert plan.kept
    for group in plan.kept:
        back = with_one_step_back(graph[group])
        assert any(functions[name](back) > limit for name, limit in limits.items()), group


def test_budgets_add_up_with_the_rebuilt_model(model):
    small = tfprune.prune(model, macs=0.5, round_to=1)
    assert measure(small).macs <= 0.5 * measure(model).macs
    # The finest step of this model is one channel of conv2.
    assert measure(small).macs >= 0.47 * measure(model).macs


def test_global_ranking_takes_the_lowest_scores(model):
    def criterion(graph):
        return Scores(
            {g.name: np.arange(g.width) + {"conv0": 0, "conv1": 100, "conv2": 200}[g.name]
             for g in graph.prunable}, "made up",
        )  # fmt: skip

    # 80 channels, of which 15 % go: the twelve lowest scores are conv0's.
    plan = tfprune.plan(model, 0.15, criterion=criterion, order="global", round_to=1)
    assert plan.kept == {"conv0": (12, 13, 14, 15)}


def test_ties_keep_the_lower_index(model):
    def criterion(graph):
        return Scores({g.name: np.ones(g.width) for g in graph.prunable}, "all equal")

    plan = tfprune.plan(model, 0.5, criterion=criterion, round_to=1)
    assert plan.kept["conv0"] == tuple(range(8))


def test_no_axis_becomes_empty():
    inputs = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(8, 1, name="wide")(inputs)
    first, second = x[..., :1], x[..., 1:]
    y = keras.layers.Conv2D(4, 1, name="narrow")(first)
    z = keras.layers.Conv2D(4, 1, name="rest")(second)
    flat = keras.layers.Flatten()(keras.layers.Concatenate()([y, z]))
    model = keras.Model(inputs, keras.layers.Dense(2)(flat))

    def criterion(graph):
        # The only channel that "narrow" reads is the worst one.
        return Scores({g.name: np.arange(g.width, dtype=float) for g in graph.prunable}, "rising")

    plan = tfprune.plan(model, 0.8, criterion=criterion, round_to=1)
    graph = tfprune.analyse(model)
    keep = graph.keep_mask(plan.kept)
    for axis in CostModel(graph).axes():
        assert keep[axis].any()
    assert tfprune.verify(model, plan)


@pytest.mark.parametrize("ratio", [-0.1, 1, 1.0, 1.5, "half", True, float("nan")])
def test_ratio_out_of_range(model, ratio):
    with pytest.raises(tfprune.TfpruneError, match="from 0 up to but not including 1"):
        tfprune.plan(model, ratio)


@pytest.mark.parametrize("macs", [0, -1, -0.5, 1.5, "half", True])
def test_budget_that_is_none(model, macs):
    with pytest.raises(tfprune.TfpruneError, match="positive"):
        tfprune.plan(model, macs=macs)


def test_budget_out_of_reach_names_the_range(model):
    least = measure(tfprune.prune(model, 0.99, round_to=1)).macs
    with pytest.raises(tfprune.TfpruneError, match=f"{least:,}"):
        tfprune.plan(model, macs=0.0001, round_to=1)


def test_nothing_would_go(model):
    with pytest.raises(tfprune.TfpruneError, match="leaves every group whole"):
        tfprune.plan(model, 0.05, round_to=8)
    assert not tfprune.plan(model, 0.0).kept
    assert not tfprune.plan(model, macs=1.0).kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pruning_ratio": 0.5, "macs": 0.5}, "Received: both"),
        ({}, "Received: neither"),
        ({"pruning_ratio": 0.5, "order": "best"}, "uniform, global"),
        ({"pruning_ratio": 0.5, "round_to": 0}, "positive integer"),
        ({"pruning_ratio": 0.5, "round_to": "phone"}, "cpu_int8"),
        ({"pruning_ratio": 0.5, "min_channels": 0}, "positive integer"),
        ({"pruning_ratio": 0.5, "max_pruning_ratio": 0}, "at most 1"),
        ({"pruning_ratio": 0.5, "ignore": "conv1"}, "write ignore="),
        ({"pruning_ratio": 0.5, "ignore": ["nowhere"]}, "matches none"),
        ({"pruning_ratio": {"nowhere": 0.5}}, "matches none"),
        ({"pruning_ratio": {"head": 0.5}}, "model output"),
        ({"pruning_ratio": {"conv0": 1.5}}, "conv0"),
        ({"pruning_ratio": 0.5, "criterion": "l3"}, "l1, l2, bn_scale"),
        ({"pruning_ratio": 0.5, "criterion": "taylor"}, "Expected data"),
        ({"pruning_ratio": 0.5, "criterion": tfprune.criteria.L1}, "call it"),
    ],
)
def test_wrong_arguments(model, options, message):
    with pytest.raises(tfprune.TfpruneError, match=message):
        tfprune.plan(model, **options)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda values: np.full(len(values), np.nan), "16 finite scores"),
        (lambda values: values[:-1], r"shape \(15,\)"),
        (lambda values: None, "none for 'conv0'"),
    ],
)
def test_scores_that_do_not_fit(model, spoil, message):
    def criterion(graph):
        values = {g.name: np.ones(g.width) for g in graph.prunable}
        values["conv0"] = spoil(values["conv0"])
        return Scores({k: v for k, v in values.items() if v is not None}, "broken")

    with pytest.raises(tfprune.TfpruneError, match=message):
        tfprune.plan(model, 0.5, criterion=criterion)


@pytest.mark.parametrize(
    ("width", "ratio", "kept"),
    [(64, 0.3, 44), (128, 0.3, 89), (16, 0.6, 6), (16, 0.1, 14), (64, 0.1, 57), (10, 0.9, 1),
     (16, 0.5, 8), (256, 0.3, 179), (512, 0.3, 358), (64, 0.7, 19), (512, 0.7, 153)],
)  # fmt: skip
def test_counts_of_the_reference_codes(width, ratio, kept):
    """Sheet A0.2: int(m (1 - p)), safe where floats make 0.99999 of a one."""
    assert kept_count(width, ratio) == kept
