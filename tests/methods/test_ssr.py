"""SSR: its proximal steps against a search, its iterations against NumPy, and exact zeros."""

from __future__ import annotations

import functools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from tests import toys
from tests.methods.models import same, snapshot
from tfprune.cost import measure
from tfprune.errors import ArgumentError, ModelError
from tfprune.graph import analyse
from tfprune.methods.ssr import SSR, Splitting, keep_large, soft
from tfprune.surgery import verify

# ---- the proximal steps --------------------------------------------------------------------------


def least(g, z, threshold):
    """The minimum of ``threshold g(f) + |f - z|^2 / 2`` over multiples of z, by a fine search.

    Both penalties depend on the norm of f alone, so that the best f points as z does.
    """
    factors = np.linspace(-0.5, 1.5, 4001)
    costs = [threshold * g(c * z) + ((c * z - z) ** 2).sum() / 2 for c in factors]
    return factors[int(np.argmin(costs))], min(costs)


PENALTIES = {"l21": np.linalg.norm, "l20": lambda f: float(np.any(f != 0))}
STEPS = {"l21": soft, "l20": keep_large}


@settings(deadline=None, max_examples=50)
@given(
    st.sampled_from(["l21", "l20"]),
    st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3),
    st.floats(0.01, 2),
)
def test_the_proximal_steps_reach_the_minimum(norm, values, threshold):
    """Sheet B8.4, step 2: both are the exact proximal points."""
    z = np.array(values, np.float64)
    squares = np.array([(z**2).sum()], np.float32)
    factor = float(np.asarray(STEPS[norm](squares, threshold))[0])
    g = PENALTIES[norm]
    cost = threshold * g(factor * z) + ((factor * z - z) ** 2).sum() / 2
    assert cost <= least(g, z, threshold)[1] + 1e-5 * (1 + (z**2).sum())  # float32


def test_the_proximal_steps_golden():
    squares = np.array([0.0, 1.0, 4.0, 25.0], np.float32)
    np.testing.assert_allclose(np.asarray(soft(squares, 2.0)), [0, 0, 0, 0.6], rtol=1e-6)
    # ||z||^2 >= 2 lambda / rho stays, equality included
    np.testing.assert_array_equal(np.asarray(keep_large(squares, 2.0)), [0, 0, 1, 1])
    rows = np.array([1.0, 1.0, 1.0, 5.0], np.float32)
    np.testing.assert_allclose(np.asarray(soft(squares, rows)), [0, 0, 0.5, 0])


# ---- a quadratic: J(D) = c/2 |D - C|^2 -----------------------------------------------------------

WIDTH, LAMBDA, RHO, RATE = 5, 0.5, 0.4, 0.5
CURVATURE = 2 / WIDTH
DESIGN = hadamard(8)[:, 1:4].astype("float32")
"""Orthogonal to one another and to the constant: with it, eight times the identity."""
CENTRE = np.array([[3, 0, 0, 4], [1, 1, 0, 0], [0, 0, 1, 0], [-2, 1, 2, 0], [0.3, 0.4, 0, 1.2]])
TARGET = (np.concatenate([DESIGN, np.ones((8, 1))], 1) @ CENTRE.T).astype("float32")


def quadratic():
    """One layer whose mean squared error is a quadratic around CENTRE, behind it the identity."""
    keras.utils.set_random_seed(0)
    first = keras.layers.Dense(WIDTH, name="first")
    head = keras.layers.Dense(WIDTH, use_bias=False, kernel_initializer="identity", name="head")
    model = keras.Sequential([keras.Input((3,)), first, head], name="quadratic")
    head.trainable = False
    return model


def trained(prepared, steps, *, momentum=0.0, jit=False, fresh=True):
    if fresh:
        optimizer = keras.optimizers.SGD(RATE, momentum=momentum)
        prepared.compile(optimizer, "mse", jit_compile=jit)
    x, y = np.tile(DESIGN, (steps, 1)), np.tile(TARGET, (steps, 1))
    prepared.fit(x, y, batch_size=8, shuffle=False, verbose=0)
    return prepared


def method(norm="l21", every=3, **options):
    return SSR(LAMBDA, norm=norm, rho=RHO, every=every, **options)


def rows_of(kernel, bias):
    return np.concatenate([np.asarray(kernel), np.asarray(bias)[None]], 0).T


def state(prepared):
    """D, F and Y."""
    (rows,) = prepared.update.held.rows
    return [
        rows_of(*pair)
        for pair in ([axis.variable for axis in rows.axes], rows.sparse, rows.multiplier)
    ]


def shrunk(z, norm, threshold=LAMBDA / RHO):
    norms = np.linalg.norm(z, axis=1, keepdims=True)
    if norm == "l20":
        return z * (norms**2 >= 2 * threshold)
    return z * np.maximum(1 - threshold / norms, 0)


def reference(steps, norm, every, momentum=0.0):
    """The same iterations in float64."""
    d = rows_of(*quadratic().layers[0].weights).astype(np.float64)
    f, y, velocity = d, np.zeros_like(d), np.zeros_like(d)
    for step in range(steps + 1):
        if step:
            gradient = CURVATURE * (d - CENTRE) + RHO * (d - f) + y
            velocity = momentum * velocity - RATE * gradient
            d = d + velocity
        if step % every == 0:
            f = shrunk(d + y / RHO, norm)
            y = y + RHO * (d - f)
    return d, f, y


@functools.cache
def whole(norm):
    return trained(method(norm).prepare(quadratic()), 20, momentum=0.5)


@pytest.mark.parametrize("norm", ["l21", "l20"])
def test_iterations_equal_the_same_in_numpy(norm):
    """Sheet B8.4, steps 1 to 3, through an optimizer with momentum."""
    for mine, wanted in zip(state(whole(norm)), reference(20, norm, 3, 0.5), strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-5)  # float32, 20 steps


def test_it_converges_to_the_group_lasso():
    """Known in closed form for a quadratic with a multiple of the identity."""
    prepared = trained(method(every=2).prepare(quadratic()), 300)
    d, f, _ = state(prepared)
    wanted = shrunk(CENTRE, "l21", LAMBDA / CURVATURE)
    assert (~wanted.any(1)).sum() == 1  # the third has norm 1 < 1.25
    np.testing.assert_allclose(f, wanted, atol=1e-4)
    np.testing.assert_allclose(d, wanted, atol=1e-4)
    assert np.array_equal(f[2], np.zeros(4))  # exactly
    assert prepared.update.figures()["zero_rows"] == pytest.approx(1 / 5)
    assert prepared.update.figures()["residual"] < 1e-4
    # What goes is what the lasso has at zero, and nothing is lost with it.
    made = method(every=2)
    assert made.plan(prepared).kept == {"first": (0, 1, 3, 4)}
    lost = np.abs(np.asarray(made.finish(prepared)(DESIGN)) - np.asarray(prepared(DESIGN)))
    assert lost.max() < 1e-3


def test_without_batch_normalisation_the_loss_is_within_the_norms_of_the_rows():
    """|lost| <= sum_k ||w[k]|| ||D_k|| ||(x, 1)||, at any point of the training."""
    prepared = whole("l21")
    made = method(pruning_ratio=0.4)
    d = state(prepared)[0]
    gone = np.setdiff1d(np.arange(WIDTH), made.plan(prepared).kept["first"])
    assert len(gone) == 2
    lost = np.asarray(made.finish(prepared)(DESIGN)) - np.asarray(prepared(DESIGN))
    bound = np.linalg.norm(d[gone], axis=1).sum() * 2  # ||(x, 1)|| = 2, ||w[k]|| = 1
    assert 0 < np.linalg.norm(lost, axis=1).max() <= bound * (1 + 1e-5)


def test_the_first_split_is_before_the_first_step():
    model = quadratic()
    d, f, y = state(method().prepare(model))
    np.testing.assert_allclose(f, shrunk(d, "l21"), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(y, RHO * (d - f), rtol=1e-5, atol=1e-7)


# ---- rows ----------------------------------------------------------------------------------------


def test_coupled_kernels_are_one_row():
    """A residual stream and a gate: kernels and biases of both layers, none of the depthwise."""
    prepared = SSR(0.1).prepare(toys.residual())
    members = {
        rows.group: [axis.member.full_name for axis in rows.axes]
        for rows in prepared.update.held.rows
    }
    assert members == {
        "stem": ["stem/kernel", "stem/bias", "project/kernel", "project/bias"],
        "expand": ["expand/kernel", "expand/bias", "excite/kernel", "excite/bias"],
        "squeeze": ["squeeze/kernel", "squeeze/bias"],
    }
    rows = prepared.update.held.rows[0]
    np.testing.assert_array_equal(rows.entries, 9 * 3 + 1 + 24 + 1)
    kernels = [np.asarray(axis.variable, np.float64) for axis in rows.axes]
    dense = np.sqrt(sum((k**2).reshape(-1, 16).sum(0) for k in kernels))
    np.testing.assert_allclose(prepared.update.norms(rows)[1], dense, rtol=1e-5)
    f = [np.asarray(f) for f in rows.sparse]
    for mine, kernel in zip(f, kernels, strict=True):
        np.testing.assert_allclose(mine, kernel * np.maximum(1 - 0.1 / dense, 0), rtol=1e-4,
                                   atol=1e-6)  # fmt: skip


def half_frozen():
    """A kernel two of whose channels are outputs of the model, and cannot go."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,), name="rows")
    x = keras.layers.Dense(6, name="first")(inputs)
    outputs = [x[:, :2], keras.layers.Dense(3, name="head")(x[:, 2:])]
    return keras.Model(inputs, outputs, name="half_frozen")


def test_what_does_not_belong_to_the_group_is_left_alone():
    prepared = SSR(5.0).prepare(half_frozen())
    (rows,) = prepared.update.held.rows
    assert len(rows.entries) == 4
    zeros = {id(v): keras.ops.zeros(v.shape) for v in prepared.trainable_variables}
    pulls = prepared.update.gradients(zeros, 0.1)
    for axis in rows.axes:
        pull = np.asarray(pulls[id(axis.variable)])
        assert not pull[..., :2].any()
    kernel = rows.axes[0].variable
    # all rows are below lambda / rho: F = 0 and Y = rho D, so that the pull is 2 rho D
    np.testing.assert_allclose(
        np.asarray(pulls[id(kernel)])[:, 2:], 2 * np.asarray(kernel)[:, 2:], rtol=1e-6
    )
    head = next(v for v in prepared.trainable_variables if v.path == "head/kernel")
    assert not np.asarray(pulls[id(head)]).any()


@pytest.mark.parametrize(("norm", "exponent"), [("l21", 0.5), ("l20", 1.0)])
def test_normalised_rows_are_measured_by_their_mean_square(norm, exponent):
    """lambda stands for lambda sqrt(n), and for lambda n: one entry's worth of a row counts."""
    plain = SSR(0.05 * 4**exponent, norm=norm).prepare(quadratic())
    scaled = SSR(0.05, norm=norm, normalise=True).prepare(quadratic())
    np.testing.assert_allclose(state(plain)[1], state(scaled)[1], rtol=1e-6)
    assert state(plain)[1].any()
    names = [prepared.update.norms(prepared.update.held.rows[0]) for prepared in (plain, scaled)]
    np.testing.assert_allclose(names[0][1], 2 * names[1][1], rtol=1e-6)


def test_weights_of_groups_and_ignore():
    """The last pattern that matches counts; ignored groups keep everything and are not pulled."""
    made = SSR(100.0, weights={"*": 0.0, "conv1": 1.0}, ignore=["conv2"])
    prepared = made.prepare(toys.chain())
    first, second = prepared.update.held.rows
    assert (first.group, first.weight, second.group, second.weight) == ("conv0", 0, "conv1", 1)
    for axis, f in zip(first.axes, first.sparse, strict=True):
        np.testing.assert_array_equal(np.asarray(f), np.asarray(axis.variable))
    assert not any(np.asarray(f).any() for f in second.sparse)
    (name, kept), *others = made.plan(prepared).kept.items()
    # All rows are zero: the channel of the largest row of D stays.
    largest = int(np.argmax(prepared.update.norms(second)[1]))
    assert (name, kept, others) == ("conv1", (largest,), [])


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("norm", ["l21", "l20"])
def test_channels_go_in_the_order_in_which_a_growing_penalty_takes_their_rows(norm, normalise):
    """Across groups with factors of their own; one that is not penalised goes last."""
    settings_ = {"norm": norm, "normalise": normalise, "weights": {"conv1": 3.0, "conv2": 0.0}}
    model = toys.chain()
    prepared = SSR(1e-9, **settings_).prepare(model)
    held = prepared.update.held.rows
    limits = np.concatenate([prepared.update.threshold(r, prepared.update.norms(r)[1])
                             for r in held])  # fmt: skip
    scores = SSR(1e-9, **settings_).scores(analyse(prepared))
    together = np.concatenate([scores[rows.group] for rows in held])
    np.testing.assert_array_equal(np.argsort(together), np.argsort(limits))
    assert limits[-16:].min() > 1e6 * limits[:-16].max()
    for penalty in np.quantile(limits[:-16], [0.2, 0.5, 0.8]) * 1.0001:  # float32: not on a row
        update = SSR(float(penalty), **settings_).prepare(model).update
        zero = np.concatenate([update.norms(rows)[0] == 0 for rows in update.held.rows])
        np.testing.assert_array_equal(zero, limits < penalty)
        assert zero.any() and not zero[:-16].all()


def test_even_weights():
    """Rows of equal distance from their thresholds, whatever the sizes of the layers."""
    model = toys.chain()
    model.get_layer("conv1").kernel.assign(10 * model.get_layer("conv1").kernel)
    model.get_layer("conv1").bias.assign(10 * model.get_layer("conv1").bias)
    before = snapshot(model)
    weights = SSR.even_weights(model)
    assert same(before, model)
    prepared = SSR(1e-3, weights=weights).prepare(model)
    means = {
        rows.group: prepared.update.threshold(rows, prepared.update.norms(rows)[1]).mean()
        for rows in prepared.update.held.rows
    }
    assert set(means) == set(weights) and len(means) > 1
    # float32 sums
    np.testing.assert_allclose(list(means.values()), next(iter(means.values())), rtol=1e-5)
    assert np.mean(list(weights.values())) == pytest.approx(1)
    nothing = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="only")])
    assert SSR.even_weights(nothing) == {}


def test_a_target_takes_zero_rows_of_f_first_and_among_them_small_ones_of_d():
    prepared = method().prepare(quadratic())
    (rows,) = prepared.update.held.rows
    d = np.array([5.0, 4, 3, 2, 1])
    f = np.array([0.0, 0, 0, 1, 2])
    rows.axes[0].variable.assign(d * np.eye(3, 1, dtype="float32"))
    rows.axes[1].variable.assign(np.zeros(5))
    rows.sparse[0].assign(f * np.eye(3, 1, dtype="float32"))
    rows.sparse[1].assign(np.zeros(5))
    orders = [
        set(range(5)) - set(SSR(1.0, pruning_ratio=r).plan(prepared).kept["first"])
        for r in (0.2, 0.4, 0.6, 0.8)
    ]
    assert orders == [{2}, {1, 2}, {0, 1, 2}, {0, 1, 2, 3}]
    assert SSR(1.0).plan(prepared).kept["first"] == (3, 4)


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return (images[:256].reshape(-1, 8, 8, 1) / 16).astype("float32"), labels[:256]


def small_net(norm):
    keras.utils.set_random_seed(0)
    layers = keras.layers
    x = inputs = keras.Input((8, 8, 1), name="image")
    for i, width in enumerate((8, 12)):
        x = layers.Conv2D(width, 3, strides=2 - i, name=f"conv{i}")(x)
        x = layers.BatchNormalization(name=f"norm{i}")(x) if norm else x
        x = layers.ReLU(name=f"relu{i}")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(10, name="head")(x), name="small")


@pytest.mark.parametrize(
    ("made", "norm"),
    [(SSR(0.3, every=4, macs=0.5), True), (SSR(0.4, every=4), False)],
    ids=["target", "own rule"],
)
def test_run_on_digits(digits, made, norm):
    model = small_net(norm)
    before = snapshot(model)
    options = {"learning_rate": 0.05, "batch_size": 32, "verbose": 0, "seed": 1}
    result = made.run(model, digits, epochs=4, **options)
    assert same(before, model)
    assert verify(result.trained, result.plan).passed
    assert measure(result.model).macs == result.macs * measure(model).macs
    history = result.record.history
    if made.macs:
        assert result.macs <= 0.5
    else:
        assert 0 < history["zero_rows"][-1] < 1
        assert result.macs < 1
        update = result.trained.update
        for rows in update.held.rows:
            width = rows.entries.size
            zero = int((update.norms(rows)[0] == 0).sum())
            kept = len(result.plan.kept.get(rows.group, range(width)))
            assert kept == max(1, width - zero)


def test_a_row_of_zeros_behind_batch_normalisation_is_a_constant():
    """What is lost is the shift, through whatever reads it."""
    prepared = SSR(0.1).prepare(small_net(True))
    weights = {v.path: v for v in prepared.variables}
    weights["conv1/kernel"].assign(np.zeros(weights["conv1/kernel"].shape))
    weights["norm1/beta"].assign(np.full(12, 0.5))
    rows = prepared.update.held.rows[1]
    for y in rows.multiplier:
        y.assign(np.zeros(y.shape))
    prepared.update.split()
    finished = SSR(0.1).finish(prepared)
    image = np.random.default_rng(0).standard_normal((3, 8, 8, 1)).astype("float32")
    lost = np.asarray(prepared(image)) - np.asarray(finished(image))
    (kept,) = SSR(0.1).plan(prepared).kept["conv1"]
    gone = np.delete(np.asarray(weights["head/kernel"]), kept, 0)
    np.testing.assert_allclose(lost, np.tile(0.5 * gone.sum(0), (3, 1)), atol=1e-5)


# ---- saving, compilation, refusals ---------------------------------------------------------------


def test_going_on_after_saving_is_the_same_training(tmp_path):
    half = trained(method().prepare(quadratic()), 10, momentum=0.5)
    half.save(tmp_path / "half.keras")
    loaded = trained(keras.models.load_model(tmp_path / "half.keras"), 10, fresh=False)
    for first, second in zip(whole("l21").variables, loaded.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))
    assert method().plan(loaded) == method().plan(whole("l21"))


def test_xla_trains_alike():
    fast = trained(method("l20").prepare(quadratic()), 20, momentum=0.5, jit=True)
    for first, second in zip(whole("l20").variables, fast.variables, strict=True):
        # float32, in another order
        np.testing.assert_allclose(np.asarray(first), np.asarray(second), rtol=1e-4, atol=1e-6)


def test_config_makes_the_same_again():
    update = SSR(0.3, norm="l20", weights={"conv0": 0.5}, ignore=["conv1"], normalise=True).update()
    assert Splitting.from_config(update.get_config()).get_config() == update.get_config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": 0}, "penalty"),
        ({"penalty": 1, "rho": -1}, "rho"),
        ({"penalty": 1, "norm": "l2"}, "norm"),
        ({"penalty": 1, "every": 0}, "every"),
        ({"penalty": 1, "weights": {"conv0": -1}}, "weights"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ArgumentError, match=message):
        SSR(**options)


def test_refuses_before_training():
    with pytest.raises(ArgumentError, match="weights to name"):
        SSR(1.0, weights={"nothing": 1.0}).prepare(quadratic())
    with pytest.raises(ModelError, match=r"SSR\.prepare"):
        SSR(1.0).scores(analyse(quadratic()))
