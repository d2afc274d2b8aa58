"""Discrimination-aware channel pruning."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import tfprune
from tests.methods.models import mlp, residual, rows, same, snapshot, stir, stripes
from tfprune.errors import ArgumentError, BudgetError, DataError, ModelError
from tfprune.graph.copying import copy_model
from tfprune.graph.masking import predict_on
from tfprune.methods.dcp import DiscriminationAwarePruning, Selection
from tfprune.methods.dcp_heads import StagedModel, candidates, cross_entropy, sites_of
from tfprune.methods.dcp_selection import Aim, converged, kappa, next_channels, slice_norms

DATA = stripes(48)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
NONE = np.zeros(0, np.int64)


def method(**arguments):
    given = {"data": DATA, "batch_size": 24, "steps": 3, "selection_rate": 0.05}
    return DiscriminationAwarePruning(**{**given, **arguments})


def linear(seed=0):
    """Two linear convolutions of one pixel, a third for the extra loss, and a head."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    x = inputs = keras.Input((4, 4, 9), name="images")
    for name, width in (("one", 7), ("two", 4), ("three", 3)):
        x = layers.Conv2D(width, 1, name=name)(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name="linear")


def branched(seed=0):
    """A concatenation, a depthwise convolution and a model within the model."""
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    inner_in = keras.Input((8, 8, 6), name="inner_in")
    y = layers.Conv2D(8, 1, activation="relu", name="expand")(inner_in)
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(y)
    y = layers.Conv2D(5, 1, activation="relu", name="project")(y)
    inner = keras.Model(inner_in, y, name="inner")
    inputs = keras.Input((8, 8, 1), name="images")
    left = layers.Conv2D(3, 3, padding="same", name="left")(inputs)
    right = layers.Conv2D(3, 1, activation="relu", name="right")(inputs)
    x = inner(layers.Concatenate(name="both")([left, right]))
    x = layers.Conv2D(4, 3, strides=2, activation="relu", name="last")(x)
    x = layers.Flatten(name="flat")(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name="branched")


def images(count=10, seed=0):
    random = np.random.default_rng(seed)
    return random.standard_normal((count, 4, 4, 9)).astype("float32"), random.integers(0, 3, count)


# -- the rules -------------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.integers(0, 99))
def test_kappa_is_the_count_of_the_code(width, percent) -> None:
    """Sheet B8.5: ``c - floor(c * rate)``; in whole numbers, without rounding."""
    assert kappa(width, percent / 100) == width - width * percent // 100


def test_the_largest_norms_are_picked() -> None:
    assert next_channels(np.array([1.0, 3.0, 3.0, 2.0]), [], 2) == [1, 2]
    assert next_channels(np.array([1.0, 3.0, 3.0, 2.0]), [1, 2], 1) == [3]
    assert next_channels(np.array([1.0, 0.0]), [0], 5) == [1]


def test_a_channel_counts_with_all_slices_that_read_it() -> None:
    """Coupled readers: squared norms add up; a channel may own several positions, or none."""
    first, second = np.full((2, 3, 4), 2.0), np.full((3, 1), 3.0)
    found = slice_norms(
        [(first, 1, np.array([0, 1, -1])), (second, 0, np.array([1, 1, 0]))], 3
    )  # fmt: skip
    np.testing.assert_allclose(found, np.sqrt([8 * 4 + 9, 8 * 4 + 18, 0]))


def test_the_stopping_rule() -> None:
    """|L_{t-1} - L_t| / L_0 <= epsilon."""
    assert not converged([2.0], 0.5)
    assert converged([2.0, 1.0], 0.5) and not converged([2.0, 0.9], 0.5)
    assert converged([4.0, 1.0, 1.2], 0.1) and not converged([1.0, 0.5, 0.7], 0.1)
    assert converged([0.0, 0.0], 0.0)


# -- where the heads stand -------------------------------------------------------------------------


def test_heads_stand_evenly_in_depth_where_no_path_leads_around_them() -> None:
    x = inputs = keras.Input((8, 8, 1))
    for number in range(1, 7):
        x = keras.layers.Conv2D(3, 3, padding="same", activation="relu", name=f"c{number}")(x)
    x = keras.layers.Dense(2)(keras.layers.Flatten()(x))
    graph = tfprune.analyse(keras.Model(inputs, x))
    assert [site.op.name for site in sites_of(graph, 2)] == ["c2", "c4"]
    assert [site.op.name for site in sites_of(graph, 1)] == ["c3"]
    assert [site.op.name for site in sites_of(graph, 6)] == [f"c{i}" for i in range(1, 7)]
    # not inside the branch, but behind its addition, at the depth of its last convolution
    graph = tfprune.analyse(residual())
    assert [(s.op.name, s.depth) for s in candidates(graph)] == [
        ("stem", 1), ("joined", 3), ("last", 4),
    ]  # fmt: skip
    # of two branches neither; nothing inside the nested model
    names = [site.op.name for site in candidates(tfprune.analyse(branched()))]
    assert names == ["both", "last"]


# -- Algorithm 2 -----------------------------------------------------------------------------------


def hidden(model, x):
    """What the reader ``two`` of the linear network takes in, as rows, and its kernel."""
    tensor = keras.Model(model.input, model.get_layer("one").output)(x)
    kernel = np.asarray(model.get_layer("two").kernel, np.float64)[0, 0]
    return np.asarray(tensor, np.float64).reshape(-1, 7), kernel


def chosen(how, model, name, width):
    selection = Selection(how, tfprune.analyse(model))
    kept = selection.choose({name: Aim((width,), NONE)})
    return selection.growths[name], selection.values(kept), kept


def test_reconstruction_alone_is_the_formula() -> None:
    """lambda = 0 and one batch, in numpy: W = 0; argmax ||G_j||; warm start; SGD on the chosen.

    G = X'(X W - O) / Q with Q all outputs, Nesterov's momentum 0.9 from rest after every pick.
    """
    data = images()
    how = method(
        data=data, discrimination=0.0, batch_size=10, steps=4, selection_rate=0.3, per_pick=2
    )
    model = how.prepare(linear())
    x, trained = hidden(model, data[0])
    target, kernel, order = x @ trained, np.zeros((7, 4)), []

    def loss():
        return np.mean((target - x @ kernel) ** 2) / 2

    losses = [loss()]
    for count in (2, 2, 1):
        norms = np.linalg.norm(x.T @ (x @ kernel - target), axis=1)
        norms[order] = -1
        new = np.argsort(-norms)[:count]
        order += new.tolist()
        kernel[new] = trained[new]
        speed = np.zeros_like(kernel)
        for _ in range(4):
            pull = np.zeros_like(kernel)
            pull[order] = 0.3 * (x.T @ (x @ kernel - target) / target.size)[order]
            speed = 0.9 * speed - pull
            kernel += 0.9 * speed - pull
        losses.append(loss())
    growth, values, kept = chosen(how, model, "one", 5)
    assert list(growth.order) == order
    np.testing.assert_allclose(growth.losses, losses, rtol=1e-4)  # float32
    np.testing.assert_allclose(values["two/kernel"][0, 0], kernel[kept["one"]], atol=1e-5)


def test_with_many_steps_it_is_orthogonal_matching_pursuit() -> None:
    """lambda = 0: slices trained to the end are least squares; picks follow the residual."""
    data = images(seed=1)
    how = method(data=data, discrimination=0.0, batch_size=10, steps=100, selection_rate=1.0)
    model = how.prepare(linear(1))
    # Nearly uncorrelated channels of unlike energies, on which SGD arrives soon.
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((9, 9)))[0]
    model.get_layer("one").kernel.assign(basis[None, None, :, :7] * np.linspace(0.7, 1.2, 7))
    x, trained = hidden(model, data[0])
    target, order, losses = x @ trained, [], []
    kernel = np.zeros((7, 4))
    for _ in range(4):
        norms = np.linalg.norm(x.T @ (x @ kernel - target), axis=1)
        norms[order] = -1
        order.append(int(np.argmax(norms)))
        kernel[order] = np.linalg.lstsq(x[:, order], target, rcond=None)[0]
        losses.append(np.mean((target - x @ kernel) ** 2) / 2)
    growth, values, kept = chosen(how, model, "one", 4)
    assert list(growth.order) == order
    np.testing.assert_allclose(growth.losses[1:], losses, rtol=1e-3)
    # float32, and the last of the way down a valley of SGD
    np.testing.assert_allclose(values["two/kernel"][0, 0], kernel[kept["one"]], atol=5e-3)


@pytest.fixture(scope="module")
def staged():
    """A prepared residual network whose heads have some weights."""
    how = method(extra_losses=1, macs=0.5)
    model = how.prepare(stir(residual()))
    random = np.random.default_rng(0)
    for variable in model.update.trainable_variables:
        variable.assign(random.normal(0.2, 0.5, variable.shape))
    return how, model


@pytest.mark.parametrize("name", ["first", "stem", "last"])
def test_the_loss_and_its_first_gradient(name, staged) -> None:
    """L = sum over readers of 1/(2Q) ||O_base - O||^2, and lambda L_S of the stage, at W = 0.

    ``first`` is read before the sum where the head stands; ``stem``, the stream, by ``first`` and
    by ``last`` behind it, so that the network's own loss judges it.
    """
    how, model = staged
    readers = {"first": ["second"], "stem": ["first", "last"], "last": ["head"]}[name]
    copy = tfprune.methods.plain_copy(residual())
    for source, target in zip(model.layers, copy.layers, strict=True):
        target.set_weights(source.get_weights())
    taps = [copy.get_layer(reader).output for reader in readers]
    tapped = keras.Model(copy.input, [*taps, copy.get_layer("joined").output, copy.output])
    x, y = DATA
    *base, _, _ = tapped(x, training=False)
    kernels = [copy.get_layer(reader).kernel for reader in readers]
    for kernel in kernels:
        kernel.assign(kernel * 0)
    with tf.GradientTape() as tape:
        *outputs, joined, logits = tapped(x, training=False)
        error = sum(tf.reduce_mean((a - b) ** 2) / 2 for a, b in zip(base, outputs, strict=True))
        if name == "first":
            logits = model.update.heads[0](joined, training=False)
        loss = error + LOSS(y, logits)
    gradients = tape.gradient(loss, [kernel.value for kernel in kernels])
    squares = sum(
        np.square(np.asarray(g)).reshape(-1, g.shape[-2], g.shape[-1]).sum((0, 2))
        for g in gradients
    )
    selection = Selection(how, tfprune.analyse(model))
    group = selection._work[name]
    problem = selection._problem(
        group, [selection._readers[r] for r in readers], selection._work.keep({})
    )
    problem.clear()
    found, slices = problem.measure()
    np.testing.assert_allclose(found, float(loss), rtol=1e-5)
    # float32; the mean over two batches
    np.testing.assert_allclose(
        slice_norms(slices, group.width), np.sqrt(squares), rtol=1e-3, atol=1e-6
    )


def test_without_steps_the_slices_are_the_trained_ones(staged) -> None:
    _, model = staged
    _, values, kept = chosen(method(extra_losses=1, steps=0), model, "first", 3)
    trained = np.asarray(model.get_layer("second").kernel)
    np.testing.assert_array_equal(values["second/kernel"], trained[:, :, kept["first"]])


def test_training_the_slices_lowers_the_reconstruction_error(staged) -> None:
    _, model = staged
    at_once = {"extra_losses": 1, "discrimination": 0.0, "per_pick": 5, "selection_rate": 0.2}
    plain, *_, before = chosen(method(**at_once, steps=0), model, "last", 5)
    grown, *_, after = chosen(method(**at_once, steps=20), model, "last", 5)
    np.testing.assert_array_equal(before["last"], after["last"])
    assert grown.losses[-1] < 0.9 * plain.losses[-1] < plain.losses[0]


def test_protected_channels_come_first(staged) -> None:
    how, model = staged
    selection = Selection(how, tfprune.analyse(model))
    kept = selection.choose({"first": Aim((2,), np.array([4]))})
    assert 4 in kept["first"] and len(kept["first"]) == 2
    assert selection.growths["first"].order[0] == 4


def test_kappa_channels_of_every_group_stay(staged) -> None:
    how = method(extra_losses=1, pruning_ratio=0.25, steps=1)
    plan = how.plan(staged[1])
    # 8 - 2, 6 - 1, 10 - 2
    assert {name: len(kept) for name, kept in plan.kept.items()} == {
        "stem": 6, "first": 5, "last": 8,
    }  # fmt: skip
    assert set(plan.values) == {
        "first/kernel", "second/kernel", "last/kernel", "head/kernel",
    }  # fmt: skip
    # nothing is random: chosen again, they are the same
    small = how.finish(staged[1])
    for name, value in plan.values.items():
        np.testing.assert_array_equal(small.get_layer(name.split("/")[0]).kernel, value)


def test_without_a_request_the_stopping_rule_decides(staged) -> None:
    _, model = staged
    graph = tfprune.analyse(model)
    how = method(extra_losses=1, epsilon=0.05)
    selection = Selection(how, graph)
    selection.choose({name: Aim(tuple(range(1, 7)), NONE) for name in ("first", "last")})
    for growth in selection.growths.values():
        losses, count = growth.losses, len(growth.order)
        assert all(not converged(losses[: t + 1], 0.05) for t in range(1, count))
        assert converged(losses, 0.05) or count == 6
    # the whole network until then; all widths even
    assert not how.choice(graph).kept
    few = {"extra_losses": 1, "ignore": ["stem", "first"]}
    plan = method(**few, epsilon=0.3, round_to=2, min_channels=3).plan(graph)
    assert len(plan.kept["last"]) in (4, 6, 8)
    # a group that needs all its channels keeps its kernels, too
    whole = method(**few, epsilon=0.0).plan(graph)
    assert not whole.kept and not whole.values


@pytest.mark.parametrize("build", [residual, branched], ids=["residual", "branched"])
def test_the_finished_network_is_the_trained_one_with_these_kernels(build) -> None:
    how = method(extra_losses=1, pruning_ratio=0.4, per_pick=2)
    model = how.prepare(stir(build()))
    before = snapshot(model)
    plan = how.plan(model)
    assert same(before, model)
    assert tfprune.verify(model, plan).passed
    graph = tfprune.analyse(model)
    keep, known = graph.keep(plan.kept), set(plan.values)
    copy = tfprune.methods.plain_copy(model)
    for site in tfprune.analyse(copy).record.sites.values():
        if site.full_name in known:
            index = [
                np.arange(size) if labels is None else np.flatnonzero(keep(labels))
                for size, labels in zip(site.variable.shape, site.labels, strict=True)
            ]
            value = np.zeros(site.variable.shape, "float32")
            value[np.ix_(*index)] = plan.values[site.full_name]
            site.variable.assign(value)
    small = tfprune.surgery.apply(copy_model(model), plan)
    assert small.count_params() < copy.count_params()
    # the same products; float32 sums without the zeros
    np.testing.assert_allclose(
        predict_on(small, [DATA[0]])[0], predict_on(copy, [DATA[0]])[0], rtol=1e-4, atol=1e-5
    )


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", ["alternating", "joint"])
def test_a_step_is_on_the_extra_losses_as_well(training) -> None:
    """Algorithm 1: a step of SGD with momentum on L_S, then one on L_f; or one on their sum."""
    x, y = DATA[0][:16], DATA[1][:16]
    how = method(training=training)
    keras.utils.set_random_seed(3)
    model, twin = how.prepare(residual()), how.prepare(residual())
    twin.set_weights(model.get_weights())
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), LOSS, run_eagerly=True)
    model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    sites = [twin.get_layer(name).output for name in ("stem", "joined")]
    tapped = keras.Model(twin.input, [twin.output, *sites])
    speeds = {id(v): np.zeros(v.shape) for v in twin.trainable_variables}

    def step(which):
        with tf.GradientTape() as tape:
            logits, *tensors = tapped(x, training=True)
            extra = [
                LOSS(y, head(tensor, training=True))
                for head, tensor in zip(twin.update.heads, tensors, strict=True)
            ] if which != "own" else []  # fmt: skip
            own = [LOSS(y, logits)] if which != "extra" else []
            loss = sum([*extra, *own])
        weights = twin.trainable_variables
        gradients = tape.gradient(loss, [v.value for v in weights])
        for variable, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                speed = 0.9 * speeds[id(variable)] - 0.1 * np.asarray(gradient)
                speeds[id(variable)] = speed
                variable.assign_add(speed)

    for _ in range(2):
        for which in ("extra", "own") if training == "alternating" else ("both",):
            step(which)
    for a, b in zip(model.trainable_variables, twin.trainable_variables, strict=True):
        # float32
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-4, err_msg=a.path)
    assert any("head_0" in v.path for v in model.trainable_variables)


def test_going_on_from_a_file(tmp_path) -> None:
    how = method(macs=0.5)
    options = {"batch_size": 16, "shuffle": False, "verbose": 0, "callbacks": how.callbacks()}

    whole = how.prepare(stir(residual()))
    whole.compile(keras.optimizers.SGD(0.1, momentum=0.9), LOSS)
    whole.fit(*DATA, epochs=1, **options)
    whole.save(tmp_path / "half.keras")
    whole.fit(*DATA, initial_epoch=1, epochs=2, **options)
    half = keras.models.load_model(tmp_path / "half.keras")
    assert isinstance(half, StagedModel)
    half.fit(*DATA, initial_epoch=1, epochs=2, **options)
    assert len(whole.variables) == len(half.variables)
    for a, b in zip(whole.variables, half.variables, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=a.path)


@pytest.fixture(scope="module")
def trained():
    """A run on scikit-learn's digits to half the MACs."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = (x.reshape(-1, 8, 8, 1) / 16).astype("float32")
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 1))
    stream = keras.layers.Conv2D(16, 3, padding="same", activation="relu", name="stem")(inputs)
    branch = keras.layers.Conv2D(12, 3, padding="same", use_bias=False, name="first")(stream)
    branch = keras.layers.ReLU()(keras.layers.BatchNormalization()(branch))
    branch = keras.layers.Conv2D(16, 3, padding="same", name="second")(branch)
    stream = keras.layers.ReLU()(keras.layers.Add(name="joined")([stream, branch]))
    stream = keras.layers.Conv2D(20, 3, strides=2, activation="relu", name="last")(stream)
    features = keras.layers.GlobalAveragePooling2D()(stream)
    source = keras.Model(inputs, keras.layers.Dense(10, "softmax", name="head")(features))
    how = method(
        data=(x[:256], y[:256]),
        batch_size=128,
        steps=16,
        selection_rate=0.005,
        per_pick=4,
        macs=0.5,
    )
    result = how.run(
        source, (x[:768], y[:768]), (x[768:1024], y[768:1024]), epochs=6, learning_rate=0.05,
        batch_size=32, verbose=0,
    )  # fmt: skip
    return source, result, (x[1024:], y[1024:])


def test_a_run_ends_at_the_macs_asked_for(trained) -> None:
    source, result, _ = trained
    assert 0.35 < result.macs <= 0.5
    small = tfprune.analyse(result.model)
    assert result.plan.kept.keys() >= {"stem", "first"}
    for name, kept in result.plan.kept.items():
        assert small[name].width == len(kept)
    assert tfprune.verify(result.trained, result.plan).passed
    # the heads are gone
    assert [layer.name for layer in result.model.layers] == [layer.name for layer in source.layers]
    assert result.difference > 0
    history = result.record.history
    assert len(history["macs"]) == 6 and history["macs"][-1] == result.macs
    assert history["loss"][-1] < history["loss"][0]


def test_the_chosen_network_classifies(trained) -> None:
    """Without fine-tuning; ten classes."""
    _, result, (x, y) = trained
    accuracy = [
        np.mean(predict_on(model, [x])[0].argmax(1) == y)
        for model in (result.trained, result.model)
    ]
    assert accuracy[0] > 0.6 and accuracy[1] > accuracy[0] - 0.25


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extra_losses": 0}, "extra_losses"),
        ({"training": "staged"}, "training"),
        ({"discrimination": -1}, "discrimination"),
        ({"epsilon": 1}, "epsilon"),
        ({"per_pick": 0}, "per_pick"),
        ({"steps": -1}, "steps"),
        ({"selection_rate": 0}, "selection_rate"),
        ({"selection_momentum": 1}, "selection_momentum"),
        ({"batches": 0}, "batches"),
        ({"macs": 0.5, "pruning_ratio": 0.5}, "both"),
    ],
    ids=range(10),
)
def test_arguments(arguments, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        method(**arguments)


def test_what_cannot_be_prepared() -> None:
    with pytest.raises(DataError, match="Received: none"):
        method(data=None).prepare(residual())
    with pytest.raises(DataError, match="Labels"):
        method(data=DATA[0]).prepare(residual())
    with pytest.raises(DataError, match="shape"):
        method(data=images()).prepare(residual())
    with pytest.raises(ArgumentError, match="which has 0"):
        method(data=rows()).prepare(mlp())
    with pytest.raises(ArgumentError, match="which has 3"):
        method(extra_losses=4).prepare(residual())
    source = residual()
    with pytest.raises(ArgumentError, match="classifier"):
        method().prepare(keras.Model(source.input, source.get_layer("last").output))
    with pytest.raises(ArgumentError, match="ignore"):
        method(ignore=["nothing"]).prepare(source)
    with pytest.raises(BudgetError, match="macs"):
        method(macs=0.001).prepare(source)
    with pytest.raises(ModelError, match="prepare"):
        method().plan(source)
    with pytest.raises(ModelError, match="trains by a method already"):
        method().prepare(method().prepare(source))


def test_a_rate_at_which_the_loss_is_lost(staged) -> None:
    how = method(extra_losses=1, macs=0.5, selection_rate=1e30)
    with pytest.raises(DataError, match="selection_rate"):
        how.plan(staged[1])


def test_channels_that_are_read_otherwise_stay() -> None:
    """A layer normalisation reads the stream: only what nothing else reads may go."""
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(4, 3, name="a")(inputs)
    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.Conv2D(4, 3, activation="relu", name="b")(x)
    x = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(x))
    how = method(extra_losses=1, pruning_ratio=0.5)
    assert how.plan(how.prepare(keras.Model(inputs, x))).kept.keys() == {"b"}


def test_the_kinds_of_labels() -> None:
    """Class numbers, one-hot rows, and yes or no."""
    logits = np.array([[2.0, 0.0, 1.0], [0.0, 1.0, 0.0]], "float32")
    expected = np.mean([-2 + np.log(np.exp(logits[0]).sum()), np.log(np.exp(logits[1]).sum())])
    for y in (np.array([0, 2]), np.array([[0], [2]]), np.eye(3, dtype="float32")[[0, 2]]):
        np.testing.assert_allclose(cross_entropy(y, logits), expected, rtol=1e-5)
    one = cross_entropy(np.array([1, 0]), np.array([[0.0], [0.0]], "float32"))
    np.testing.assert_allclose(one, np.log(2), rtol=1e-5)
