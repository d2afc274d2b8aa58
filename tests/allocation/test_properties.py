"""What every plan respects, on functional models that hypothesis makes up."""

import math
from collections import Counter

import keras
import pytest
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st

import tfprune
from tfprune.allocation import ORDERS, Constraints, chains, kept_by_steps
from tfprune.allocation.budget import cost_functions
from tfprune.cost import CostModel
from tfprune.graph.plan import PruningPlan
from tfprune.testing.strategies import draw_model

# Models are slow to build: no deadline, and the same examples in every run.
PROFILE = settings(
    deadline=None,
    derandomize=True,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def _check_constraints(graph, plan, options):
    step = options["round_to"]
    for group in graph.prunable:
        kept = len(plan.kept.get(group.name, range(group.width)))
        coarse = step // math.gcd(step, group.inner)
        assert kept >= min(group.width, options["min_channels"])
        # 1e-9: the fraction is computed in float64.
        assert 1 - kept / group.width <= options["max_pruning_ratio"] + 1e-9
        assert kept == group.width or group.width < coarse or kept * group.inner % step == 0
    keep = graph.keep_mask(plan.kept)
    assert all(keep[axis].any() for axis in CostModel(graph).axes())


@pytest.mark.slow
@PROFILE
@given(data=st.data())
def test_plans(data):
    model = draw_model(data.draw)
    graph = tfprune.analyse(model)
    costs = CostModel(graph)
    options = {
        "round_to": data.draw(st.sampled_from([1, 2, 4, 8])),
        "min_channels": data.draw(st.integers(1, 4)),
        "max_pruning_ratio": data.draw(st.sampled_from([0.3, 0.75, 1.0])),
    }
    criterion = tfprune.criteria.Random(data.draw(st.integers(0, 9)))
    name = data.draw(st.sampled_from(sorted(ORDERS)))
    order = ORDERS[name](chain_list := chains(graph, criterion(graph), Constraints(**options),
                                              costs))  # fmt: skip
    assume(order)

    def mask(steps):
        return graph.keep_mask(kept_by_steps(chain_list, Counter(order[:steps])))

    # Every step lowers the number of parameters, and no cost ever rises.
    functions = cost_functions(costs)
    for kind, cost in functions.items():
        values = [cost(mask(steps)) for steps in range(len(order) + 1)]
        assert values == sorted(values, reverse=True)
        assert kind == "macs" or len(set(values)) == len(values)

    kind = data.draw(st.sampled_from(sorted(functions)))
    cost = functions[kind]
    least, dense = cost(mask(len(order))), cost(mask(0))
    limit = data.draw(st.integers(least, dense))
    plan = tfprune.plan(graph, criterion=criterion, order=name, **options, **{kind: limit})
    assert cost(costs.mask(plan)) <= limit
    _check_constraints(graph, plan, options)
    # Nothing goes that the shortest prefix keeps, and no step of any group can be given back.
    steps = next(i for i in range(len(order) + 1) if cost(mask(i)) <= limit)
    assert (costs.mask(plan) >= mask(steps)).all()
    kept = {chain.group.name: len(plan.kept.get(chain.group.name, range(chain.group.width)))
            for chain in chain_list}  # fmt: skip
    taken = {i: chain.widths.index(kept[chain.group.name]) for i, chain in enumerate(chain_list)}
    for number, count in taken.items():
        if count:
            back = kept_by_steps(chain_list, {**taken, number: count - 1})
            assert cost(graph.keep_mask(back)) > limit
    with pytest.raises(tfprune.TfpruneError, match=f"{least:,}"):
        tfprune.plan(graph, criterion=criterion, order=name, **options, **{kind: least - 1})

    keras.backend.clear_session(free_memory=False)


@pytest.mark.slow
@PROFILE
@given(data=st.data(), ratio=st.sampled_from([0.3, 0.5, 0.8, 0.95]))
def test_ratios_and_files(data, ratio, tmp_path_factory):
    model = draw_model(data.draw)
    graph = tfprune.analyse(model)
    options = {"round_to": data.draw(st.sampled_from([1, 4])), "min_channels": 2,
               "max_pruning_ratio": 0.9}  # fmt: skip
    ignored = data.draw(st.sampled_from([group.name for group in graph.groups]))
    criterion = tfprune.criteria.Random(3)
    try:
        plan = tfprune.plan(graph, ratio, criterion=criterion, ignore=[ignored], **options)
    except tfprune.TfpruneError as error:
        if "leaves every group whole" not in str(error):
            raise
        reject()
    assert ignored not in plan.kept
    _check_constraints(graph, plan, options)
    for group in graph.prunable:
        kept = len(plan.kept.get(group.name, range(group.width)))
        assert kept >= math.floor(group.width * (1 - ratio))
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert PruningPlan.load(path) == plan

    keras.backend.clear_session(free_memory=False)
