"""LASSO channel pruning: the path against its optimality conditions, and selection in graphs."""

import keras
import numpy as np
import pytest
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

import tfprune
from tests import toys
from tests.criteria.test_thinet import concatenated, transposed
from tfprune.cost import measure
from tfprune.criteria.lasso import Lasso, Path, path_of
from tfprune.criteria.reconstruction.problem import Problem
from tfprune.criteria.selection import Quota, Selector
from tfprune.graph.plan import PruningPlan
from tfprune.testing import check_criterion, randomize

layers = keras.layers
DATA = toys.images(32)
NONE = np.zeros(0, np.int64)


def explicit(seed, channels=7, inner=3, rows=40, filters=4, noise=0.5):
    """Patches, filters and targets of one layer, and the problem that they make."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((channels, rows, inner))
    w = random.standard_normal((channels, inner, filters)) * random.uniform(
        0.1, 3, (channels, 1, 1)
    )
    z = (x @ w).reshape(channels, -1)
    y = z.sum(0) + noise * random.standard_normal(z.shape[1])
    return z, y, Problem(z @ z.T, z @ y, float(y @ y), np.sqrt((w**2).sum((1, 2))))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 7, 15]))
def test_every_knot_of_the_path_is_optimal(seed, channels):
    """The conditions of the LASSO, on explicit regressors of unit-norm filters (sheet A3, step 2).

    For 1/2 ||y - Z b||^2 + lambda ||b||_1: the correlation of each regressor in use with what is
    left is lambda times the coefficient's sign, and no other is larger.
    """
    z, y, problem = explicit(seed, channels)
    path = path_of(problem, 0.0)
    unit = z / problem.norms[:, None]
    top = np.abs(unit @ y).max()
    assert path.lambdas[0] == pytest.approx(top)
    for value, beta in zip(path.lambdas, path.betas, strict=True):
        correlation = unit @ (y - beta @ unit)
        # Sums of some hundred float64 terms; scikit-learn stops updating at about 1e-7.
        np.testing.assert_array_less(np.abs(correlation), value + 1e-6 * top)
        used = np.abs(beta) > 1e-9 * np.abs(path.betas).max()
        expected = value * np.sign(beta[used])
        np.testing.assert_allclose(correlation[used], expected, atol=1e-6 * top)
    assert (np.diff(path.lambdas) <= 0).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_lambda_zero_gives_back_the_filters(seed):
    """Sheet A3, oracles: lambda = 0 returns zero error and beta_i = ||W_i||_F; list 10 item 4."""
    z, _, problem = explicit(seed, noise=0.0)
    path = path_of(problem, 1e-12)
    assert path.lambdas[-1] <= 1e-6 * path.lambdas[0]
    np.testing.assert_allclose(path.betas[-1], problem.norms, rtol=1e-5)
    raw = path.betas[-1] / problem.norms
    assert problem.loss(raw) <= 1e-9 * problem.energy
    rest = z.sum(0) - raw @ z
    assert rest @ rest <= 1e-9 * problem.energy


def test_scores_and_choices_along_a_path():
    lambdas = np.array([4.0, 3.0, 2.0, 1.0, 0.0])
    betas = np.array(
        [
            [0, 0, 0, 0, 0],
            [0, 5, 0, 0, 0],
            [0, 3, 1, 0, 0],
            [0, 1, 2, 0, 9],
            [0, 0, 3, 0, -8],
        ],
        float,
    )
    path = Path(lambdas, betas)
    scores = path.scores()
    # Channels 1, 2 and 4 enter at 4, 3 and 2; the others never do, and the lower index stays.
    np.testing.assert_allclose(scores, [0, 1, 0.75, 0, 0.5], atol=1e-12)
    assert scores[0] > scores[3] > 0
    assert path.choose(1, NONE).tolist() == [1]
    # The smallest lambda with at most two: the last point, where channel 1 has left again.
    assert path.choose(2, NONE).tolist() == [2, 4]
    assert path.choose(2, np.array([1])).tolist() == [1, 4]
    assert path.choose(4, NONE).tolist() == [0, 1, 2, 4]  # a shortage, filled up by the scores
    assert path.choose(2, NONE, np.array([0, 2])).tolist() == [0, 2]


def test_equal_and_dead_channels():
    z, y, _ = explicit(0)
    z[3] = z[1]
    z[5] = 0
    norms = np.ones(7)
    problem = Problem(z @ z.T, z @ y, float(y @ y), norms)
    path = path_of(problem, 1e-6)
    assert np.isfinite(path.betas).all()
    # What one of the pair would get is shared in some way; the ridge moves it by about 1e-6.
    rest = np.array([0, 1, 2, 4, 6])
    single = path_of(
        Problem(z[rest] @ z[rest].T, z[rest] @ y, float(y @ y), norms[rest]), 1e-6
    ).betas[-1]
    np.testing.assert_allclose(path.betas[-1][[1, 3]].sum(), single[1], rtol=1e-3)
    assert 5 not in path.choose(6, NONE)
    empty = path_of(Problem(np.zeros((3, 3)), np.zeros(3), 0.0, np.ones(3)), 1e-6)
    assert empty.choose(2, NONE).tolist() == [0, 1]
    assert np.argsort(empty.scores()).tolist() == [2, 1, 0]


@pytest.mark.parametrize("build", [toys.chain, toys.residual])
def test_contract(build):
    check_criterion(Lasso(DATA), build())


@pytest.mark.parametrize("alternate", [0, 2])
def test_a_combination_of_other_channels_can_go(alternate):
    """Sheet A3, oracles: removable with error 0 after the W-step."""
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(6, 3, name="conv")(inputs)  # linear, so that combinations stay combinations
    x = layers.Conv2D(4, 2, name="next")(x)
    model = randomize(keras.Model(inputs, x))
    kernel, bias = model.get_layer("conv").get_weights()
    kernel[..., 4] = 0.5 * kernel[..., 0] - 2 * kernel[..., 3]
    bias[4] = 0.5 * bias[0] - 2 * bias[3]
    model.get_layer("conv").set_weights([kernel, bias])
    data = np.random.default_rng(0).standard_normal((40, 6, 6, 3)).astype("float32")
    protected = np.array([0, 1, 2, 3, 5])
    lasso = Lasso(data, alternate=alternate, ridge=1e-6)
    graph = tfprune.analyse(model)
    selection = lasso.select(graph, {"conv": Quota(5, protected)})
    assert selection.kept["conv"].tolist() == protected.tolist()
    plan = PruningPlan.of(graph, selection.kept, None, selection.values)
    before, after = model.predict_on_batch(data), plan.apply(model).predict_on_batch(data)
    # float32 layers, and a ridge of 1e-6 of the mean energy.
    np.testing.assert_allclose(after, before, atol=1e-3 * np.abs(before).max())
    plain = PruningPlan.of(graph, selection.kept).apply(model).predict_on_batch(data)
    assert np.abs(plain - before).max() > 0.1 * np.abs(before).max()


@pytest.mark.parametrize("name", ["chain", "residual", "concatenated", "tf_keras"])
def test_masked_is_pruned_with_the_new_kernels(name):
    """Sheet A, list 10 item 6, with values."""
    model = {
        "chain": toys.chain,
        "residual": toys.residual,
        "concatenated": lambda: concatenated(keras),
        "tf_keras": lambda: concatenated(tf_keras),
    }[name]()
    before = [np.array(weight) for weight in model.get_weights()]
    plan = tfprune.plan(model, 0.5, criterion=Lasso(DATA, alternate=1), round_to=1)
    groups = {group.name for group in tfprune.analyse(model).prunable}
    assert set(plan.kept) == groups and plan.values
    assert tfprune.verify(model, plan, tolerance=1e-5)  # a few float32 layers
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_budgets_are_met():
    model = toys.chain()
    dense = measure(model).macs
    for order in ("uniform", "global"):
        plan = tfprune.plan(model, macs=0.5, criterion=Lasso(DATA), round_to=1, order=order)
        assert 0.3 * dense < measure(model, plan).macs <= 0.5 * dense


def test_arguments_and_groups_that_cannot_be_used():
    assert isinstance(Lasso(DATA), Selector)
    for alternate in (-1, 0.5, True):
        with pytest.raises(tfprune.TfpruneError, match="Expected alternate to be"):
            Lasso(DATA, alternate=alternate)
    with pytest.raises(tfprune.TfpruneError, match="Expected ridge to be at least 0"):
        Lasso(DATA, ridge=-1.0)
    with pytest.raises(tfprune.TfpruneError, match="Expected positions to be a positive"):
        Lasso(DATA, positions=0)
    with pytest.raises(tfprune.TfpruneError, match="which only 'up' reads"):
        tfprune.plan(transposed(), 0.5, criterion=Lasso(DATA), round_to=1)
    graph = tfprune.analyse(toys.chain())
    with pytest.raises(tfprune.TfpruneError, match="empty"):
        Lasso(DATA[:0]).select(graph, {"conv1": Quota(3, NONE)})
    with pytest.raises(tfprune.TfpruneError, match="NaN or infinity at the input of 'conv2'"):
        Lasso(np.full_like(DATA, np.nan)).select(graph, {"conv1": Quota(3, NONE)})
