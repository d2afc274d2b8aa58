"""NetAdapt: steps that meet their targets, the rule, any cost, any executor."""

import numpy as np
import pytest

import tfprune
from tests.protocols.models import examples
from tests.search.models import DISTANCE, network
from tfprune.cost import CostModel, measure
from tfprune.errors import ArgumentError, BudgetError, DataError
from tfprune.search import Metric, Retraining, netadapt
from tfprune.search.netadapt import Proposal, _best

OPTIONS = {
    "metric": DISTANCE, "round_to": 1, "first_step": 0.2, "decay": 0.9, "progress": False,
    "retraining": Retraining(batches=1, batch_size=16, learning_rate=1e-2),
}  # fmt: skip


@pytest.fixture(scope="module")
def adapted():
    model, data = network(), examples()
    return model, data, netadapt(model, data, data, budget=0.65, **OPTIONS)


def test_every_step_meets_its_target(adapted):
    model, _, result = adapted
    dense = measure(model).macs
    assert result.dense_cost == dense
    spent, saving = dense, 0.2 * dense
    for step in result.steps:
        assert step.target == pytest.approx(max(spent - saving, 0.65 * dense))
        assert all(proposal.cost <= step.target for proposal in step.proposals)
        # The largest width that does: one channel more of the same group would not.
        spent, saving = step.best.cost, saving * 0.9
    assert measure(result.model).macs == result.steps[-1].best.cost <= 0.65 * dense
    graph = tfprune.analyse(result.model)
    for step in result.steps:
        assert graph[step.best.group].width <= step.best.width


def test_proposals_are_the_largest_widths(adapted):
    model, _, result = adapted
    graph = tfprune.analyse(model)
    costs = CostModel(graph)
    first = result.steps[0]
    assert [p.group for p in first.proposals] == [g.name for g in graph.prunable]
    for proposal in first.proposals:
        wider = graph.keep_mask({proposal.group: np.arange(proposal.width + 1)})
        assert costs.macs(wider) > first.target


def test_the_score_of_a_step_is_that_of_its_network(adapted):
    """The trained weights come back to the network that goes on."""
    _, (x, y), result = adapted
    outputs = np.asarray(result.model.predict_on_batch(x))
    # Another batch size, so another order of float32 sums.
    assert DISTANCE(y, outputs) == pytest.approx(result.steps[-1].best.score, rel=1e-5)


def test_the_source_is_left_alone(adapted):
    model, _, _ = adapted
    for old, new in zip(network().weights, model.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(old), np.asarray(new))


def test_the_rule():
    """The code's ratio and the paper's accuracy: drops of 0.02 for 0.1 and of 0.03 for 0.2."""
    accuracy = Metric(np.mean, larger_is_better=True, name="accuracy")
    proposals = [Proposal("a", 1, 90.0, 0.78), Proposal("b", 1, 80.0, 0.77)]
    assert _best(proposals, "accuracy", accuracy, 0.80, 100.0, 100.0) == 0
    # 0.02 / 0.1 = 0.2 and 0.03 / 0.2 = 0.15
    assert _best(proposals, "ratio", accuracy, 0.80, 100.0, 100.0) == 1


def test_any_cost_will_do():
    """A cost of one's own: the channels of the second group count ten times."""
    model, data = network(), examples()

    def cost(graph):
        ids = {group.name: group.channel_ids for group in graph.prunable}
        weight = {name: 10.0 if name == "conv1" else 1.0 for name in ids}
        return lambda mask: sum(weight[name] * mask[ids[name]].sum() for name in ids)

    result = netadapt(model, data, data, budget=0.8, cost=cost, **OPTIONS)
    assert result.dense_cost == 6 + 80 + 10
    assert result.steps[-1].best.cost <= 0.8 * 96
    assert "conv1" in {step.best.group for step in result.steps}
    assert str(result).startswith("NetAdapt from squares")


def test_refusals():
    model, data = network(), examples()
    for bad, match in (
        ({"budget": 1.5}, "budget as a fraction"),
        ({"cost": "time"}, "cost to be one of"),
        ({"first_step": 0}, "first_step above 0"),
        ({"rule": "best"}, "rule to be"),
    ):
        with pytest.raises(ArgumentError, match=match):
            netadapt(model, data, data, **{**OPTIONS, **bad})
    with pytest.raises(BudgetError, match="Expected a group that brings the cost"):
        netadapt(model, data, data, **{**OPTIONS, "first_step": 0.9, "budget": 0.05})
    with pytest.raises(DataError, match="Labels are needed"):
        netadapt(model, data, data[0], **OPTIONS)
