"""Reconstruction behind any criterion: the W-step, residual sums, and what it is worth."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tfprune
from tests import toys
from tests.criteria.test_thinet import concatenated, transposed
from tfprune.cost import measure
from tfprune.criteria import L1, GreedyL1
from tfprune.criteria.lasso import Lasso
from tfprune.criteria.reconstructed import Reconstructed
from tfprune.criteria.reconstruction import targets
from tfprune.criteria.reconstruction.least_squares import refit
from tfprune.criteria.reconstruction.moments import Moments
from tfprune.criteria.reconstruction.readers import readers_of
from tfprune.criteria.selection import Quota, Selection, Selector
from tfprune.criteria.thinet import ThiNet
from tfprune.testing import check_criterion, randomize

layers = keras.layers


def smooth(count, size=8, seed=0):
    """Images whose neighbouring pixels and colours go together, as in photographs."""
    random = np.random.default_rng(seed)
    coarse = random.standard_normal((count, size // 2, size // 2, 3))
    fine = np.repeat(np.repeat(coarse, 2, axis=1), 2, axis=2)
    fine = fine + fine.mean(3, keepdims=True) + 0.3 * random.standard_normal(fine.shape)
    return fine.astype("float32")


TRAIN, TEST = smooth(64), smooth(32, seed=1)


def error(model, plan):
    """Squared error of the outputs on other data, relative to their variance."""
    before = model.predict_on_batch(TEST)
    after = plan.apply(model).predict_on_batch(TEST)
    return np.mean((after - before) ** 2) / np.mean((before - before.mean(0)) ** 2)


def test_refit_is_least_squares():
    """Sheet A3, step 3: W' = argmin ||Y - X' W'||, with a ridge towards the trained kernel."""
    random = np.random.default_rng(0)
    reader = readers_of(tfprune.analyse(toys.chain()))["conv1"]
    x, y = random.standard_normal((1, 300, 72)), random.standard_normal((1, 300, 12))
    moments = Moments(x.mT @ x, x.mT @ y, (y**2).sum(1), 300)
    kept = np.array([1, 0, 1, 1, 0, 1, 1, 1], bool)
    columns = np.repeat(kept, 9)
    found = refit(reader, moments, kept, 0.0)[0]
    expected, *_ = np.linalg.lstsq(x[0][:, columns], y[0], rcond=None)
    np.testing.assert_allclose(found[columns], expected, atol=1e-9)  # float64 sums
    np.testing.assert_array_equal(found[~columns], 0)
    # Fewer rows than unknowns: exact on the rows, and as trained where they say nothing.
    x, y = x[:, :20], y[:, :20]
    moments = Moments(x.mT @ x, x.mT @ y, (y**2).sum(1), 20)
    found = refit(reader, moments, kept, 1e-9)[0][columns]
    np.testing.assert_allclose(x[0][:, columns] @ found, y[0], atol=1e-5)
    trained = reader.matrix(reader.kernel)[0][columns]
    basis = np.linalg.svd(x[0][:, columns])[2][20:]
    np.testing.assert_allclose(basis @ found, basis @ trained, atol=1e-5)


@pytest.mark.parametrize("build", [toys.chain, toys.residual])
def test_contract(build):
    check_criterion(Reconstructed(L1(), TRAIN), build())


@pytest.mark.parametrize("build", [toys.chain, toys.residual])
def test_reconstruction_lowers_the_error(build):
    """On other data than it was made with; channels of smooth images are correlated."""
    model = build()
    plain = tfprune.plan(model, 0.4, criterion=L1(), round_to=1)
    rebuilt = tfprune.plan(model, 0.4, criterion=Reconstructed(L1(), TRAIN), round_to=1)
    assert rebuilt.kept == plain.kept  # the criterion's channels
    assert rebuilt.notes["criterion"] == "L1 norm, reconstructed"
    assert error(model, rebuilt) < 0.3 * error(model, plain)
    for criterion in (Lasso(TRAIN), ThiNet(TRAIN)):
        chosen = tfprune.plan(model, 0.4, criterion=criterion, round_to=1)
        assert error(model, chosen) < 0.5 * error(model, plain)


def test_the_first_reader_alone_is_optimal():
    """With one group pruned, no other kernel of that reader does better on the same rows."""
    model = toys.chain()
    plan = tfprune.plan(
        model,
        {"conv1": 0.5},
        criterion=Reconstructed(L1(), TRAIN, positions=64, ridge=1e-9),
        round_to=1,
    )
    assert list(plan.values) == ["conv2/kernel"]
    sub = keras.Model(model.inputs[0], model.get_layer("conv2").output)
    small = plan.apply(model)
    small = keras.Model(small.inputs[0], small.get_layer("conv2").output)
    target = np.asarray(sub(TRAIN))
    best = np.mean((np.asarray(small(TRAIN)) - target) ** 2)
    kernel = small.get_layer("conv2").kernel
    found = np.asarray(kernel)
    random = np.random.default_rng(0)
    for _ in range(5):
        kernel.assign(found + 0.01 * random.standard_normal(found.shape))
        assert np.mean((np.asarray(small(TRAIN)) - target) ** 2) > best


def residual_blocks():
    """A stream that loses nothing, next to branches that do; the last sums are normalised."""
    keras.utils.set_random_seed(1)
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(12, 3, padding="same", name="stem")(inputs)
    for block in range(3):
        y = layers.Conv2D(12, 3, padding="same", activation="relu", name=f"inner{block}")(x)
        y = layers.Conv2D(12, 3, padding="same", name=f"last{block}")(y)
        y = layers.BatchNormalization(name=f"norm{block}")(y)
        x = layers.Add(name=f"sum{block}")([x, y])
    return randomize(keras.Model(inputs, x))


@pytest.mark.parametrize("method", [Lasso, lambda data, **kw: Reconstructed(L1(), data, **kw)],
                         ids=["lasso", "reconstructed"])  # fmt: skip
def test_residual_branches_make_up_for_the_shortcut(method):
    """Sheet A3, step 6a: the drift of the other summand is part of the target."""
    model = residual_blocks()
    ratios = {"inner0": 0.75, "inner1": 0.25, "inner2": 0.25}
    errors = [
        error(
            model,
            tfprune.plan(model, ratios, criterion=method(TRAIN, residual=residual), round_to=1),
        )
        for residual in (True, False)
    ]
    assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("name", ["chain", "residual", "concatenated", "tf_keras"])
def test_masked_is_pruned_with_the_new_kernels(name):
    """Sheet A, list 10 item 6, with values."""
    model = {
        "chain": toys.chain,
        "residual": toys.residual,
        "concatenated": lambda: concatenated(keras),
        "tf_keras": lambda: concatenated(tf_keras),
    }[name]()
    plan = tfprune.plan(model, 0.5, criterion=Reconstructed(GreedyL1(), TRAIN), round_to=1)
    same = tfprune.plan(model, 0.5, criterion=GreedyL1(), round_to=1)
    assert plan.kept == same.kept and plan.values
    assert tfprune.verify(model, plan, tolerance=1e-5)  # a few float32 layers


def test_targets_are_kept_while_they_fit(monkeypatch):
    model, seen = toys.chain(), []
    evaluated = targets.inputs_at
    monkeypatch.setattr(
        targets, "inputs_at", lambda graph, *rest: seen.append(graph) or evaluated(graph, *rest)
    )

    def values(data, **options):
        seen.clear()
        criterion = Reconstructed(L1(), data, **options)
        return tfprune.plan(model, 0.5, criterion=criterion, round_to=1).values

    kept = values(TRAIN, batch_size=32)
    assert len(seen) == 2  # each batch once, for three readers
    monkeypatch.setattr(targets, "_MOST_BYTES", 0)
    again = values(TRAIN, batch_size=32)
    assert len(seen) == 6
    for name, value in kept.items():
        np.testing.assert_array_equal(value, again[name])


def test_data_in_another_order_each_time():
    """Rows and targets belong together although the kept targets are of other batches."""
    data = tf.data.Dataset.from_tensor_slices(TRAIN).shuffle(64, seed=0).batch(16)
    criterion = Reconstructed(L1(), data, positions=64)
    model = toys.chain()
    plain = tfprune.plan(model, 0.4, criterion=L1(), round_to=1)
    plan = tfprune.plan(model, 0.4, criterion=criterion, round_to=1)
    assert error(model, plan) < 0.3 * error(model, plain)


def test_inner_layers_of_a_nested_model():
    inside = keras.Input((8, 8, 6))
    y = layers.Conv2D(8, 3, activation="relu", name="first")(inside)
    block = keras.Model(inside, layers.Conv2D(6, 3, name="second")(y), name="block")
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 1, activation="relu", name="stem")(inputs)
    x = layers.GlobalAveragePooling2D()(block(x))
    model = randomize(keras.Model(inputs, layers.Dense(3, name="head")(x)))
    plan = tfprune.plan(model, 0.5, criterion=Reconstructed(L1(), TRAIN), round_to=1)
    assert set(plan.values) == {"block/first/kernel", "block/second/kernel", "head/kernel"}
    assert tfprune.verify(model, plan, tolerance=1e-5)


def test_budgets_are_met():
    model = toys.chain()
    dense = measure(model).macs
    plan = tfprune.plan(model, macs=0.5, criterion=Reconstructed(L1(), TRAIN), round_to=1)
    assert 0.3 * dense < measure(model, plan).macs <= 0.5 * dense


def test_values_of_the_criterion_stay_but_for_those_solved_for():
    model = toys.chain()
    graph = tfprune.analyse(model)

    class Fixed:
        def __call__(self, graph):
            return L1()(graph)

        def select(self, graph, quotas):
            kept = {name: np.arange(quota.width) for name, quota in quotas.items()}
            values = {
                "conv1/bias": np.full(12, 0.25, "float32"),
                "conv1/kernel": np.zeros((3, 3, 4, 12), "float32"),
            }
            return Selection(kept, values, {"fixed": "yes"})

    assert isinstance(Fixed(), Selector)
    found = Reconstructed(Fixed(), TRAIN).select(graph, {"conv0": Quota(4, np.zeros(0, int))})
    np.testing.assert_array_equal(found.kept["conv0"], np.arange(4))
    assert found.notes == {"fixed": "yes"}
    np.testing.assert_array_equal(found.values["conv1/bias"], 0.25)
    assert found.values["conv1/kernel"].any()


def test_groups_that_nothing_linear_reads_are_named():
    model = transposed()
    plan = tfprune.plan(model, 0.5, criterion=Reconstructed(L1(), TRAIN), round_to=1)
    assert set(plan.kept) == {"conv", "up"} and list(plan.values) == ["out/kernel"]
    assert plan.notes["not reconstructed"] == "conv"
    assert tfprune.verify(model, plan)


def test_no_data_to_solve_from():
    with pytest.raises(tfprune.TfpruneError, match=r"as an object, such as criteria.L1\(\)"):
        Reconstructed("l1", TRAIN)
    with pytest.raises(tfprune.TfpruneError, match="as an object"):
        Reconstructed(L1, TRAIN)
    with pytest.raises(tfprune.TfpruneError, match="Expected images to be a positive"):
        Reconstructed(L1(), TRAIN, images=0)
    with pytest.raises(tfprune.TfpruneError, match="Expected ridge"):
        Reconstructed(L1(), TRAIN, ridge=-1)
    model = toys.chain()
    with pytest.raises(tfprune.TfpruneError, match="empty"):
        tfprune.plan(model, 0.5, criterion=Reconstructed(L1(), TRAIN[:0]), round_to=1)
    # Two examples with one position for 72 unknowns: the ridge decides, nothing breaks.
    few = Reconstructed(L1(), TRAIN[:2], positions=1)
    plan = tfprune.plan(model, 0.5, criterion=few, round_to=1)
    assert tfprune.verify(model, plan)
    zero = Reconstructed(L1(), TRAIN[:2], positions=1, ridge=0)
    with pytest.raises(tfprune.TfpruneError, match=r"singular one of .* with ridge=0"):
        tfprune.plan(model, 0.5, criterion=zero, round_to=1)
