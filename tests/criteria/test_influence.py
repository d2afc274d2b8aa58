"""Influence: the expansion, compensation by gates and by parameters, against explicit solutions."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfprune
from tests import toys
from tfprune.cost import measure
from tfprune.criteria import Quota
from tfprune.criteria.curvature import Curvature, conjugate_gradients, response_of_parameters
from tfprune.criteria.gates import moments, phi
from tfprune.criteria.influence import Influence, compensated_rise, rise, surviving_gates
from tfprune.errors import ArgumentError, DataError
from tfprune.graph.plan import PruningPlan
from tfprune.testing import check_criterion, randomize

layers = keras.layers
DATA = (toys.images(40), toys.labels(40))
NONE = np.zeros(0, np.int64)


def fisher(seed=0, size=8, examples=30):
    rows = np.random.default_rng(seed).normal(size=(examples, size)) * np.linspace(0.2, 2, size)
    return rows.T @ rows / examples


def concatenation():
    inputs = keras.Input((8, 8, 3))
    a = layers.Conv2D(6, 3, activation="relu", name="a")(inputs)
    x = layers.Concatenate(name="both")([a, layers.Conv2D(6, 3, name="b")(inputs)])
    x = layers.Flatten(name="flat")(layers.DepthwiseConv2D(3, name="depthwise")(x))
    return randomize(keras.Model(inputs, layers.Dense(5, name="head")(x)))


CRITERIA = {
    "plain": Influence(DATA),
    "curvature": Influence(DATA, gradient_term=False),
    "compensation": Influence(DATA, mode="compensation"),
    "per mac": Influence(DATA, per_mac=True),
}


@pytest.mark.parametrize("name", ["plain", "compensation"])
@pytest.mark.parametrize("build", [toys.chain, toys.residual])
def test_contract(name, build):
    check_criterion(CRITERIA[name], build())


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("build", [toys.chain, toys.residual, concatenation])
def test_plans(name, build):
    model = build()
    order = "global" if name == "per mac" else "uniform"
    plan = tfprune.plan(model, macs=0.5, criterion=CRITERIA[name], round_to=1, order=order)
    assert tfprune.verify(model, plan)
    assert bool(plan.values) == (name == "compensation")


def test_expansion_from_gate_gradients():
    """Sheet B9 A: -mean phi + mean phi^2 / 2, members of a group summed before squaring."""
    graph = tfprune.analyse(toys.residual())
    values = phi(graph, DATA)
    scores = Influence(DATA)(graph)
    curvature = Influence(DATA, gradient_term=False)(graph)
    for name, rows in values.items():
        scale = np.abs(rows).max()
        expected = -rows.mean(0) + 0.5 * (rows**2).mean(0)
        # float32 gradients, twice.
        np.testing.assert_allclose(scores[name], expected, atol=1e-5 * scale)
        np.testing.assert_allclose(curvature[name], 0.5 * (rows**2).mean(0), atol=1e-5 * scale**2)
    assert min(values.min() for values in scores.values.values()) < 0
    np.testing.assert_array_equal(rise(np.array([1.0]), np.array([4.0])), [1.0])


def test_prediction_near_one():
    """The first order is exact where little of a channel is left to remove."""
    model = toys.chain()
    graph = tfprune.analyse(model)
    kernel = np.asarray(model.get_layer("conv2").kernel).copy()

    def loss(factor):
        changed = kernel.copy()
        changed[:, :, 7] *= factor
        model.get_layer("conv2").kernel.assign(changed)
        logits = np.asarray(model(DATA[0]), np.float64)
        rows = np.arange(len(logits))
        return np.mean(np.log(np.exp(logits).sum(1)) - logits[rows, DATA[1]])

    before = loss(0.1)
    score = Influence(DATA)(graph)["conv1"][7]
    rises = loss(0) - before
    # The second order is a tenth of the first one's size in the gate, and F only stands for it;
    # the logits are float32.
    assert score == pytest.approx(rises, rel=0.2, abs=1e-6)
    assert abs(rises) > 1e-4


def test_a_channel_that_nobody_reads_is_worth_nothing():
    model = toys.chain()
    kernel = np.asarray(model.get_layer("conv2").kernel).copy()
    kernel[:, :, 4] = 0
    model.get_layer("conv2").kernel.assign(kernel)
    graph = tfprune.analyse(model)
    assert Influence(DATA)(graph)["conv1"][4] == 0
    head = model.get_layer("head")
    head.kernel.assign(np.zeros_like(np.asarray(head.kernel)))
    for mode in ("no_compensation", "compensation"):
        scores = Influence(DATA, mode=mode)(graph)
        np.testing.assert_array_equal(scores["conv1"], np.zeros(12))


def test_compensation_against_explicit_minimisation():
    """Sheet B9 B: exact for a quadratic; one gate is zero, all others are solved for."""
    matrix = fisher()
    damped = matrix + 0.1 * np.diag(matrix).mean() * np.eye(8)
    expected = []
    for channel in range(8):
        rest = np.delete(np.arange(8), channel)
        step = np.full(8, -1.0)
        step[rest] = np.linalg.solve(damped[np.ix_(rest, rest)], damped[rest, channel])
        expected.append(0.5 * step @ damped @ step)
    # float64.
    np.testing.assert_allclose(compensated_rise(matrix, 0.1), expected, rtol=1e-10)


def test_surviving_gates_are_stationary():
    matrix = fisher()
    damping = 0.1
    damped = matrix + damping * np.diag(matrix).mean() * np.eye(8)
    kept = np.array([0, 2, 3, 6])
    step = np.full(8, -1.0)
    step[kept] = surviving_gates(matrix, kept, damping) - 1
    np.testing.assert_allclose((damped @ step)[kept], 0, atol=1e-12)  # float64
    # One channel: the update of Hassibi and Stork, sheet B9 B.
    inverse = np.linalg.inv(damped)
    single = np.delete(1 - inverse[:, 5] / inverse[5, 5], 5)
    np.testing.assert_allclose(
        surviving_gates(matrix, np.delete(np.arange(8), 5), damping), single, rtol=1e-10
    )
    np.testing.assert_array_equal(surviving_gates(np.zeros((4, 4)), np.array([1]), 0.1), [1.0])


def test_a_twin_takes_over():
    """Of two equal channels one goes and the other counts twice: the outputs stay."""
    model = toys.chain()
    for name in ("conv1", "norm1"):
        layer = model.get_layer(name)
        weights = layer.get_weights()
        for weight in weights:
            weight[..., 5] = weight[..., 7]
        layer.set_weights(weights)
    reader = model.get_layer("conv2")
    kernel = np.asarray(reader.kernel).copy()
    kernel[:, :, 5] = kernel[:, :, 7]
    reader.kernel.assign(kernel)
    graph = tfprune.analyse(model)
    criterion = Influence(DATA, mode="compensation", damping=1e-6)
    scores = criterion(graph)["conv1"]
    plain = Influence(DATA, gradient_term=False)(graph)["conv1"]
    assert max(scores[[5, 7]]) < 1e-3 * min(plain[[5, 7]])
    others = np.delete(np.arange(12), [5, 7])
    selection = criterion.select(graph, {"conv1": Quota(11, others)})
    assert len(set(selection.kept["conv1"]) & {5, 7}) == 1
    plan = PruningPlan.of(graph, selection.kept, {}, selection.values)
    assert tfprune.verify(model, plan)
    before, after = np.asarray(model(DATA[0])), np.asarray(plan.apply(model)(DATA[0]))
    # The damping holds the gates back a little, and the gradients are float32.
    np.testing.assert_allclose(after, before, atol=2e-3 * np.abs(before).max())
    bare = PruningPlan.of(graph, selection.kept, {}, {}).apply(model)
    assert np.abs(np.asarray(bare(DATA[0])) - before).max() > 1e-2 * np.abs(before).max()


def test_per_mac():
    graph = tfprune.analyse(toys.residual())
    scores, shares = Influence(DATA)(graph), Influence(DATA, per_mac=True)(graph)
    whole = measure(graph.model).macs
    for name, index in (("stem", 3), ("expand", 0), ("squeeze", 7)):
        kept = np.delete(np.arange(graph[name].width), index)
        saved = whole - measure(graph.model, PruningPlan.of(graph, {name: kept})).macs
        assert saved > 0
        # One division, and float32 gradients of two runs.
        assert shares[name][index] == pytest.approx(scores[name][index] * whole / saved, rel=1e-4)


def smooth():
    """Two hidden layers of smooth units, few parameters."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((3,))
    x = layers.Dense(4, activation="tanh", name="first")(inputs)
    x = layers.Dense(3, activation="tanh", name="second")(x)
    return randomize(keras.Model(inputs, layers.Dense(2, name="head")(x)))


def points(count, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((count, 3)).astype("float32"), random.integers(0, 2, count)


def curvature_of(model, data, loss=None):
    return Curvature(tfprune.analyse(model), data, loss, batches=None, batch_size=16)


def hessian(curvature):
    size = sum(int(np.prod(v.shape)) for v in curvature.variables)
    return np.stack([curvature.product(unit) for unit in np.eye(size)])


def test_hessian_products():
    model, data = smooth(), points(20)
    curvature = curvature_of(model, data)
    matrix = hessian(curvature)
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-6)  # float32
    start = [np.asarray(v).copy() for v in model.trainable_variables]
    direction = np.random.default_rng(1).normal(size=len(matrix))
    sides = []
    for step in (1e-2, -1e-2):
        parts = np.split(direction, np.cumsum([v.size for v in start])[:-1])
        for variable, value, part in zip(model.trainable_variables, start, parts, strict=True):
            variable.assign(value + step * part.reshape(value.shape))
        sides.append(curvature.gradient())
    # Central differences of float32 gradients: errors of 1e-4 from the step, 1e-5 from rounding.
    np.testing.assert_allclose(
        (sides[0] - sides[1]) / 2e-2, matrix @ direction, atol=2e-3 * np.abs(matrix).max()
    )


def test_conjugate_gradients():
    matrix = fisher(1, 12) + 0.1 * np.eye(12)
    target = np.random.default_rng(0).normal(size=12)
    found = conjugate_gradients(lambda v: matrix @ v, target, iterations=40, residual=1e-10)
    np.testing.assert_allclose(found, np.linalg.solve(matrix, target), rtol=1e-8)
    zeros = conjugate_gradients(lambda v: matrix @ v, np.zeros(12), iterations=5, residual=1e-3)
    np.testing.assert_array_equal(zeros, np.zeros(12))
    # Negative curvature ends the iteration, and does not lead away.
    bent = np.diag([1.0, 2.0, -3.0])
    found = conjugate_gradients(lambda v: bent @ v, np.ones(3), iterations=9, residual=1e-9)
    assert np.isfinite(found).all() and 0.5 * found @ bent @ found - found.sum() <= 0


def test_parameters_follow_a_gate():
    """Sheet B9 C, linearised, against the explicit inverse and finite differences of the gate."""
    model, train, data = smooth(), points(24), points(24, 1)
    graph = tfprune.analyse(model)
    found = response_of_parameters(
        graph, data, train, None, batches=None, batch_size=16, damping=0.3, iterations=200,
        residual=1e-6,
    )  # fmt: skip
    curvature = curvature_of(model, train)
    matrix, target = hessian(curvature), curvature_of(model, data).gradient()
    names = [v.path for v in model.trainable_variables]
    sizes = [int(np.prod(v.shape)) for v in model.trainable_variables]
    # All weights of "first" and the kernel that reads it scale its channels.
    free = {"first": ["second/bias", "head"], "second": ["first", "head/bias"]}
    for group, reader in (("first", "second"), ("second", "head")):
        mask = np.repeat([any(f in n for f in free[group]) for n in names], sizes)
        assert 0 < mask.sum() < len(mask)
        solution = np.zeros(len(mask))
        system = matrix[np.ix_(mask, mask)] + 0.3 * np.eye(mask.sum())
        solution[mask] = np.linalg.solve(system, target[mask])
        kernel = model.get_layer(reader).kernel
        value = np.asarray(kernel).copy()
        for channel in range(graph[group].width):
            sides = []
            for step in (1e-2, -1e-2):
                changed = value.copy()
                changed[channel] *= 1 + step
                kernel.assign(changed)
                sides.append(curvature.gradient() @ solution)
            kernel.assign(value)
            numeric = (sides[0] - sides[1]) / 2e-2
            # Differences of float32 gradients over the step.
            assert found[group][channel] == pytest.approx(numeric, rel=2e-2, abs=2e-5)


def test_own_scale_must_be_frozen():
    """Sheet B9, degeneracy: with all parameters free they undo a change of a gate exactly.

    At a minimum of the training loss, the response of the parameters then cancels the gradient of
    the validation loss with respect to the gate.
    """
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    model = keras.Model(
        inputs, layers.Dense(1, name="head")(layers.Dense(4, name="hidden")(inputs))
    )

    def squared(labels, outputs):
        return (outputs[:, 0] - labels) ** 2

    x, _ = points(40)
    train = x, np.asarray(model(x))[:, 0]
    data = points(30, 1)[0], np.random.default_rng(2).normal(size=30).astype("float32")
    graph = tfprune.analyse(model)
    curvature = curvature_of(model, train, squared)
    target = curvature_of(model, data, squared).gradient()
    solution = conjugate_gradients(
        lambda v: curvature.product(v) + 1e-5 * v, target, iterations=200, residual=1e-6
    )
    gradient = moments(graph, data, squared).mean["hidden"]
    total = gradient - curvature.by_gates(solution, "hidden")
    # The damping, relative to the eigenvalues of H, and float32.
    np.testing.assert_allclose(total, 0, atol=1e-2 * np.abs(gradient).max())
    frozen = response_of_parameters(
        graph, data, train, squared, batches=None, batch_size=64, damping=1e-5, iterations=100
    )["hidden"]
    assert np.abs(gradient - frozen).max() > 0.1 * np.abs(gradient).max()


def test_koh_liang_is_the_expansion_and_the_response():
    model, train, data = smooth(), points(24), points(24, 1)
    graph = tfprune.analyse(model)
    criterion = Influence(data, mode="koh_liang", train=train, damping=0.3)
    moved = response_of_parameters(
        graph, data, train, None, batches=16, batch_size=64, damping=0.3, iterations=50
    )
    scores, plain = criterion(graph), Influence(data)(graph)
    for name in scores:
        # The same computation, twice.
        np.testing.assert_allclose(scores[name], plain[name] + moved[name], rtol=1e-6, atol=1e-9)
        assert not np.allclose(scores[name], plain[name], rtol=1e-2)
    plan = tfprune.plan(model, macs=0.5, criterion=criterion, round_to=1)
    assert tfprune.verify(model, plan)


def test_bad_input():
    graph = tfprune.analyse(toys.chain())
    with pytest.raises(ArgumentError, match="Expected mode"):
        Influence(DATA, mode="obs")
    for damping in (0, -1, np.nan):
        with pytest.raises(ArgumentError, match="positive damping"):
            Influence(DATA, damping=damping)
    with pytest.raises(ArgumentError, match=r"koh_liang.*without train"):
        Influence(DATA, mode="koh_liang")
    with pytest.raises(ArgumentError, match="with train"):
        Influence(DATA, train=DATA)
    with pytest.raises(ArgumentError, match="iterations"):
        Influence(DATA, iterations=0)
    with pytest.raises(DataError, match="Labels"):
        Influence(DATA[0])(graph)
    with pytest.raises(DataError, match="empty"):
        Influence((DATA[0][:0], DATA[1][:0]))(graph)
    with pytest.raises(ArgumentError, match="one value per example"):
        Influence(DATA, loss=lambda y, o: tf.reduce_mean(o))(graph)
    inputs = keras.Input((6, 8))
    x = layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs)
    attention = keras.Model(inputs, layers.Dense(2, name="out")(x[:, 0]))
    data = np.zeros((4, 6, 8), "float32"), np.zeros(4, int)
    with pytest.raises(ArgumentError, match=r"koh_liang.*reads inside its layer"):
        Influence(data, mode="koh_liang", train=data)(tfprune.analyse(attention))
