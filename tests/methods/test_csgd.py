"""Centripetal SGD: the update, its speed, and that nothing is lost in the end (sheet B6)."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tfprune import fine_tune
from tfprune.errors import ArgumentError, BudgetError
from tfprune.graph import analyse
from tfprune.methods.csgd import CentripetalSGD, CentripetalUpdate, clustered
from tfprune.methods.merging import left_alone
from tfprune.testing import randomize

layers = keras.layers


def _small(seed=0):
    """A stem, a depthwise convolution, a concatenation, a residual sum, and a flatten."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False, name="stem")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.8, name="norm")(x))
    y = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    y = layers.Conv2D(6, 1, activation="relu", name="inner")(y)
    y = layers.Concatenate()([x, y])
    y = layers.BatchNormalization(momentum=0.8, name="both")(y)
    y = layers.Conv2D(8, 1, name="back")(y)
    x = layers.ReLU()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(10, name="head")(layers.Flatten()(x)))


def _tiny():
    """For what has to be compiled again and again."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8, 8, 1))
    x = layers.Conv2D(6, 3, strides=4, name="conv")(inputs)
    x = layers.Flatten()(layers.ReLU()(layers.BatchNormalization(name="norm")(x)))
    return keras.Model(inputs, layers.Dense(10, name="head")(x))


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return (x[:640].reshape(-1, 8, 8, 1) / 16).astype("float32"), y[:640]


@pytest.fixture(scope="module")
def trained(digits):
    model = _small()
    fine_tune(model, digits, epochs=3, learning_rate=0.05, verbose=0)
    return model


def _matrices(clusters, strength, decay):
    """Gamma and Lambda of the sheet, for rows that are filters."""
    width = len(clusters)
    same = np.equal.outer(clusters, clusters)
    size = same.sum(1)
    gamma = same / size
    pull = np.where(same, -strength / size[:, None], 0.0)
    pull[np.arange(width), np.arange(width)] = decay + (1 - 1 / size) * strength
    return gamma, pull


def test_rows_of_the_matrices() -> None:
    """Sheet B6, checks: Gamma's rows sum to 1, Lambda's to eta."""
    gamma, pull = _matrices(np.array([0, 1, 0, 2, 1, 0]), 3e-3, 1e-4)
    np.testing.assert_allclose(gamma.sum(1), 1, rtol=1e-12)
    # sums of terms of 3e-3, in float64
    np.testing.assert_allclose(pull.sum(1), 1e-4, rtol=1e-12)


def _bound(model, clusters, strength=0.7, decay=0.2, vectors=0.1):
    update = CentripetalUpdate(strength, decay, vectors)
    update.bind(analyse(model))
    update.assign(clusters)
    return update


def test_gradients_are_those_of_the_matrices() -> None:
    """Gamma G + Lambda W along every axis that makes or accompanies; concatenated groups too."""
    model, random = randomize(_small()), np.random.default_rng(0)
    clusters = {"stem": random.integers(0, 3, 8), "inner": np.array([0, 1, 1, 0, 2, 1])}
    update = _bound(model, clusters)
    gradients = {
        v.path: random.standard_normal(v.shape).astype("float32") for v in model.trainable_variables
    }
    found = update.gradients({id(v): gradients[v.path] for v in model.trainable_variables}, 0.1)

    def expected(path, axis, numbers):
        weight = next(v for v in model.trainable_variables if v.path == path)
        weight = np.moveaxis(np.asarray(weight).astype(np.float64), axis, 0)
        gradient = np.moveaxis(gradients[path].astype(np.float64), axis, 0)
        is_vector = weight.ndim == 1
        gamma, pull = _matrices(numbers, 0.07 if is_vector else 0.7, 0 if is_vector else 0.2)
        rows = gamma @ gradient.reshape(len(gamma), -1) + pull @ weight.reshape(len(pull), -1)
        return np.moveaxis(rows.reshape(gradient.shape), 0, axis)

    stem, inner = clusters["stem"], clusters["inner"]
    tied = {
        "stem/kernel": (3, stem), "norm/gamma": (0, stem), "norm/beta": (0, stem),
        "depthwise/kernel": (2, stem), "depthwise/bias": (0, stem),
        "inner/kernel": (3, inner), "inner/bias": (0, inner),
        "both/gamma": (0, np.r_[stem, 10 + inner]), "both/beta": (0, np.r_[stem, 10 + inner]),
        "back/kernel": (3, stem), "back/bias": (0, stem),
    }  # fmt: skip
    tied |= {"head/kernel": (1, np.arange(10)), "head/bias": (0, np.arange(10))}
    assert set(tied) == set(gradients)
    for variable in model.trainable_variables:
        axis, numbers = tied[variable.path]
        # float32 sums of at most eight terms of order 1
        np.testing.assert_allclose(
            np.asarray(found[id(variable)]), expected(variable.path, axis, numbers), atol=1e-5
        )


def test_positions_behind_each_other_are_paired() -> None:
    """A gate's kernel of an LSTM: a unit has four columns, and each goes with its like."""
    inputs = keras.Input((4, 3))
    x = layers.LSTM(4, name="lstm")(inputs)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    update = _bound(model, {"lstm": np.array([0, 1, 0, 2])}, strength=1.0, decay=0.0)
    kernel = model.get_layer("lstm").cell.kernel
    gradient = np.arange(48, dtype="float32").reshape(3, 4, 4)
    found = update.gradients({id(kernel): gradient.reshape(3, 16)}, 0.1)[id(kernel)]
    value = np.asarray(kernel).reshape(3, 4, 4)
    change = np.asarray(found).reshape(3, 4, 4)
    mean = gradient[:, :, [0, 2]].mean(2)
    for unit in (0, 2):
        away = value[:, :, unit] - value[:, :, [0, 2]].mean(2)
        np.testing.assert_allclose(change[:, :, unit], mean + away, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(change[:, :, [1, 3]], gradient[:, :, [1, 3]], rtol=1e-6)


def test_a_weight_that_is_tied_along_two_axes() -> None:
    """Values of attention: clusters of heads, and of positions within all heads."""
    inputs = keras.Input((5, 6))
    x = layers.MultiHeadAttention(4, 3, value_dim=5, name="attention")(inputs, inputs)
    model = keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))
    heads, width = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 2, 0])
    clusters = {"attention:heads": heads, "attention:value width": width}
    update = _bound(model, clusters, strength=0.7, decay=0.2)
    kernel = model.get_layer("attention")._value_dense.kernel
    gradient = np.random.default_rng(0).standard_normal(kernel.shape).astype("float32")
    weight = np.asarray(kernel).astype(np.float64)
    means = [np.equal.outer(c, c) / np.bincount(c)[c] for c in (heads, width)]
    mean = np.einsum("ihw,hg,wv->igv", gradient - 0.7 * weight, *means)
    found = update.gradients({id(kernel): gradient}, 0.1)[id(kernel)]
    np.testing.assert_allclose(found, mean + 0.9 * weight, atol=1e-6)  # float32, of order 1


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_deviations_shrink_by_the_rate_of_the_paper(momentum, digits) -> None:
    """Sheet B6: by 1 - tau (eta + epsilon) a step, whatever the data; momentum's own recurrence.

    With momentum compiled by XLA, too, which gives the same.
    """
    model = randomize(_tiny() if momentum else _small())
    strength, decay, rate, steps = 2.0, 0.5, 0.05, 10
    prepared = CentripetalSGD(strength, decay, "even", pruning_ratio=0.6).prepare(model)
    before = {v.path: np.asarray(v).astype(np.float64) for v in prepared.trainable_variables}
    prepared.compile(
        keras.optimizers.SGD(rate, momentum=momentum),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=momentum > 0,
    )
    x, y = digits
    prepared.fit(x[:80], y[:80], batch_size=8, epochs=1, verbose=0, shuffle=False)

    def factor(pull):
        """What is left of a deviation of 1 after the steps."""
        left, speed = 1.0, 0.0
        for _ in range(steps):
            speed = momentum * speed - rate * pull * left
            left += speed
        return left

    if momentum == 0:
        assert factor(2.5) == pytest.approx((1 - rate * 2.5) ** steps)
    clusters = prepared.update.clusters()
    if momentum:
        tied = [("conv/kernel", 3, clusters["conv"]), ("norm/gamma", 0, clusters["conv"])]
    else:
        stem, inner = clusters["stem"], clusters["inner"]
        tied = [
            ("stem/kernel", 3, stem), ("back/kernel", 3, stem), ("depthwise/kernel", 2, stem),
            ("norm/gamma", 0, stem), ("back/bias", 0, stem), ("inner/kernel", 3, inner),
            ("both/beta", 0, np.r_[stem, 10 + inner]),
        ]  # fmt: skip
    for path, axis, numbers in tied:
        now = next(v for v in prepared.trainable_variables if v.path == path)
        pull = strength + decay if len(now.shape) > 1 else 0.1 * strength
        mean = np.equal.outer(numbers, numbers) / np.bincount(numbers)[numbers]
        deviations = [
            value - np.moveaxis(np.tensordot(mean, value, (1, axis)), 0, axis)
            for value in (before[path], np.asarray(now).astype(np.float64))
        ]
        assert np.abs(deviations[0]).max() > 0.05
        # float32 weights of order 1 after ten steps
        np.testing.assert_allclose(
            deviations[1], factor(pull) * deviations[0], rtol=1e-4, atol=3e-6
        )
    assert prepared.update.figures()["cluster_deviation"] > 0


def test_singletons_are_ordinary_sgd_with_decay(digits) -> None:
    """Sheet B6, step 3. With a penalty in the loss in the place of the update's decay."""
    model = randomize(_small())
    update = _bound(model, {}, strength=1.0, decay=0.03)
    for variable in model.trainable_variables:
        gradient = np.ones(variable.shape, "float32")
        found = np.asarray(update.gradients({id(variable): gradient}, 0.1)[id(variable)])
        decay = 0.03 if len(variable.shape) > 1 else 0
        np.testing.assert_allclose(found, 1 + decay * np.asarray(variable), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def result(trained, digits):
    # lr * strength = 0.25: weights contract by 0.75 a step, and vectors by 0.975 even without
    # momentum; 30 steps a pass.
    method = CentripetalSGD(strength=5.0, macs=0.4)
    return method.run(
        trained, digits, epochs=6, learning_rate=0.05, batch_size=20, schedule="constant",
        optimizer=keras.optimizers.SGD(momentum=0.5), verbose=0,
    )  # fmt: skip


def test_run(result, trained, digits) -> None:
    """Sheet B6, check: outputs before and after merging agree within 1e-4 after convergence."""
    assert 0.35 < result.macs <= 0.4
    assert result.difference < 1e-4
    history = result.record.history
    assert history["cluster_deviation"][-1] < 1e-9 < 1e-3 < history["cluster_deviation"][0]
    assert history["macs"][0] == pytest.approx(result.macs)
    assert {n: len(k) for n, k in result.plan.kept.items()}.keys() == {"stem", "inner"}
    assert history["width/stem"][-1] == len(result.plan.kept["stem"])
    x, y = digits
    accuracy = (np.argmax(result.model.predict(x, verbose=0), -1) == y).mean()
    before = (np.argmax(trained.predict(x, verbose=0), -1) == y).mean()
    assert before > 0.9 and accuracy > 0.9
    assert not hasattr(result.model, "update")


def test_merging_too_early_is_measured(digits) -> None:
    with pytest.warns(UserWarning, match=r"still differ by \d+"):
        result = CentripetalSGD(strength=1e-3, macs=0.5).run(
            _tiny(), digits, epochs=1, learning_rate=1e-3, verbose=0
        )
    assert result.difference > 0.01


def test_saving_in_the_middle(digits, tmp_path) -> None:
    """Clusters are state: a loaded model goes on as if it had not been interrupted."""
    x, y = (part[:128] for part in digits)
    ends = []
    for interrupted in (False, True):
        keras.utils.set_random_seed(0)
        prepared = CentripetalSGD(1.0, pruning_ratio=0.5).prepare(_tiny())
        prepared.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
        for _ in range(2):
            prepared.fit(x, keras.ops.one_hot(y, 10), epochs=1, verbose=0, shuffle=False)
            if interrupted:
                prepared.save(tmp_path / "model.keras")
                prepared = keras.models.load_model(tmp_path / "model.keras")
        ends.append([np.asarray(v) for v in prepared.variables])
        assert prepared.update.clusters().keys() == {"conv"}
        assert prepared.update.strength == 1.0
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("ignore:Filters of a cluster still differ")
def test_resuming(digits, tmp_path) -> None:
    x, y = (part[:128] for part in digits)
    method = CentripetalSGD(1.0, pruning_ratio=0.5)
    file, ends = tmp_path / "state", []
    for epochs in (1, 2):
        ends.append(
            method.run(_tiny(), (x, y), epochs=epochs, checkpoint=file, learning_rate=0.05,
                       verbose=0).model
        )  # fmt: skip
    whole = method.run(_tiny(), (x, y), epochs=2, learning_rate=0.05, verbose=0).model
    for one, other in zip(ends[1].weights, whole.weights, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.filterwarnings("ignore:Filters of a cluster still differ")
def test_the_bound_for_layers_without_normalisation() -> None:
    """|d_l| <= |W_l| |d_(l-1)| + |W_l - P W_l| |h'_(l-1)|, as in the module's docstring."""
    keras.utils.set_random_seed(3)
    inputs = keras.Input((5,))
    x = layers.Dense(12, "relu", name="a")(inputs)
    x = layers.Dense(10, "relu", name="b")(x)
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    method = CentripetalSGD(1.0, widths={"a": 6, "b": 5})
    prepared = method.prepare(model)
    small = method.finish(prepared)
    x = np.random.default_rng(0).standard_normal((20, 5)).astype("float32")
    kernels = [np.asarray(model.get_layer(n).kernel).astype(np.float64) for n in ("a", "b", "head")]
    numbers = [*(prepared.update.clusters()[n] for n in ("a", "b")), np.arange(3)]
    bound, hidden = np.zeros(len(x)), x.astype(np.float64)
    for number, (kernel, clusters) in enumerate(zip(kernels, numbers, strict=True)):
        mean = np.equal.outer(clusters, clusters) / np.bincount(clusters)[clusters]
        away = kernel - kernel @ mean
        bound = np.linalg.norm(kernel, 2) * bound
        bound += np.linalg.norm(away, 2) * np.linalg.norm(hidden, axis=1)
        hidden = hidden @ (kernel @ mean)
        hidden = hidden if number == 2 else np.maximum(hidden, 0)
    found = np.linalg.norm(np.asarray(model(x)) - np.asarray(small(x)), axis=1)
    assert (found <= bound).all() and found.max() > 0.05 * bound.max()
    np.testing.assert_allclose(np.asarray(small(x)), hidden, atol=1e-5)  # float32 sums


# -- clusters ----------------------------------------------------------------------------------


def test_clusterings() -> None:
    filters = np.zeros((7, 2))
    assert clustered(filters, 3, "even").tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert clustered(filters, 3, "biased").tolist() == [0, 0, 0, 0, 0, 1, 2]
    for how in ("even", "biased", "kmeans"):
        assert clustered(np.eye(4), 4, how).tolist() == [0, 1, 2, 3]
        assert clustered(np.eye(4), 1, how).tolist() == [0, 0, 0, 0]


def test_kmeans_finds_groups_and_makes_as_many_as_asked() -> None:
    filters = np.array([[0.0], [5.0], [0.1], [9.0], [5.1]])
    assert clustered(filters, 3).tolist() == [0, 1, 0, 2, 1]
    # Two different filters, and three clusters asked for.
    assert sorted(np.bincount(clustered(np.array([[0.0], [1], [1], [1]]), 3))) == [1, 1, 2]


def test_the_pacesetter_decides(trained) -> None:
    """A residual stream is clustered by the kernel that makes it first."""
    graph = analyse(trained)
    kernel = np.asarray(trained.get_layer("stem").kernel).reshape(-1, 8).T
    clusters = CentripetalSGD(widths={"stem": 4}).clusters(graph)
    np.testing.assert_array_equal(clusters["stem"], clustered(kernel, 4))
    assert clusters.keys() == {"stem"}


# -- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "one of macs, pruning_ratio and widths"),
        ({"macs": 0.5, "widths": {"stem": 2}}, "Received: 2 of them"),
        ({"macs": 0.5, "strength": 0}, "positive strength"),
        ({"macs": 0.5, "vector_strength": np.nan}, "positive vector_strength"),
        ({"macs": 0.5, "weight_decay": -1}, "weight_decay from 0"),
        ({"macs": 0.5, "clustering": "random"}, "kmeans, even, biased"),
        ({"macs": 0.5, "seed": -1}, "seed"),
    ],
)
def test_bad_arguments(options, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        CentripetalSGD(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"widths": {"nothing": 2}}, ArgumentError, "matches none"),
        ({"widths": {"stem": 9}}, ArgumentError, "9 of the 8"),
        ({"widths": {"stem": 0}}, ArgumentError, "stem"),
        ({"widths": {"stem": 8}}, ArgumentError, "every group stays whole"),
        ({"widths": {"head": 3}}, ArgumentError, "which all stay"),
        ({"macs": 1e-6}, BudgetError, "budget within reach"),
    ],
)
def test_bad_widths(options, error, message) -> None:
    with pytest.raises(error, match=message):
        CentripetalSGD(**options).prepare(_small())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adam"}, "Expected SGD.*'adam'"),
        ({"optimizer": keras.optimizers.RMSprop()}, "RMSprop"),
        ({"optimizer": keras.optimizers.SGD(clipvalue=1.0)}, "clipvalue"),
        ({"optimizer": keras.optimizers.SGD(weight_decay=1e-3)}, "weight_decay=0.001"),
        ({"weight_decay": 1e-4}, "no weight_decay for fine_tune"),
        ({"learning_rate": 400.0}, "at most 1"),
    ],
)
def test_options_that_would_undo_it(options, message, digits) -> None:
    with pytest.raises(ArgumentError, match=message):
        CentripetalSGD(macs=0.5).run(_small(), digits, epochs=1, verbose=0, **options)


def test_adam_is_refused_by_the_callbacks(digits) -> None:
    method = CentripetalSGD(macs=0.5)
    prepared = method.prepare(_small())
    prepared.compile("adam", "mse")
    x, y = digits
    with pytest.raises(ArgumentError, match="Adam"):
        prepared.fit(x, y, callbacks=method.callbacks(), verbose=0)


def test_groups_that_are_left_alone() -> None:
    """Layer normalisation, frozen layers; the plan says why."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, name="a")(inputs)
    x = layers.Conv2D(8, 1, name="b")(layers.LayerNormalization(name="norm")(x))
    x = layers.Conv2D(8, 1, name="c", trainable=False)(x)
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    graph = analyse(model)
    assert left_alone(graph).keys() == {"a", "c"}
    prepared = CentripetalSGD(pruning_ratio=0.5).prepare(model)
    plan = CentripetalSGD(pruning_ratio=0.5).plan(prepared)
    assert plan.kept.keys() == {"b"} and len(plan.kept["b"]) == 4
    assert "a: layer normalisation" in plan.notes["left alone"]
    assert "c: c is not trained" in plan.notes["left alone"]
    with pytest.raises(ArgumentError, match="4 of the 8 channels of 'a', which all stay: layer"):
        CentripetalSGD(widths={"a": 4}).prepare(model)
    model.get_layer("b").trainable = False
    with pytest.raises(ArgumentError, match=r"has none\. a: layer normalisation"):
        CentripetalSGD(pruning_ratio=0.5).prepare(model)


def test_scores_and_other_models(trained) -> None:
    method = CentripetalSGD(widths={"stem": 4}, clustering="even")
    prepared = method.prepare(trained)
    scores = method.scores(analyse(prepared))
    assert scores["stem"].tolist() == [1, 0] * 4 and scores["inner"].tolist() == [1] * 6
    with pytest.raises(ArgumentError, match=r"CentripetalSGD\.prepare"):
        method.plan(trained)
