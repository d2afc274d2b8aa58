"""What a candidate is worth: the masked model measures as the really pruned one."""

from __future__ import annotations

import pickle

import keras
import numpy as np
import pytest
import tf_keras

import tfprune
from tests import toys
from tests.search.models import DISTANCE, examples, network, squares, trained, validation
from tfprune.errors import ArgumentError, DataError
from tfprune.graph.plan import PruningPlan
from tfprune.search import Metric
from tfprune.search.measuring import Judge, Measurement, resolve_metric
from tfprune.testing import randomize
from tfprune.workers import PortableModel, gather


def measure(model, metric=DISTANCE, calibration=None, data=None):
    return Judge(
        Measurement(
            PortableModel(model),
            gather(data or validation(), labels=True, batch_size=20),
            metric,
            None if calibration is None else gather(calibration, batch_size=25),
        )
    )


def by_hand(model, kept, data, calibration=None):
    """Real surgery, Keras's own prediction."""
    small = tfprune.PruningPlan.of(tfprune.analyse(model), kept).apply(model)
    if calibration is not None:
        tfprune.recalibrate_batch_norm(small, calibration, batch_size=25)
    x, y = data
    return squares(y, small.predict(x, verbose=0))


KEPT = {"conv0": (0, 2, 5), "conv1": (1, 3, 4, 7), "conv2": (0, 1, 2, 9)}


@pytest.mark.parametrize("recalibrated", [False, True])
@pytest.mark.parametrize("framework", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_masked_equals_pruned(framework, recalibrated):
    """Sheet A1, "efficient sensitivity"; with recalibration on the masked model as well.

    Tolerance: float32 through three convolutions, in another order of summation.
    """
    model = trained() if framework is keras else network(tf_keras)
    calibration = examples(75, seed=2)[0] if recalibrated else None
    judge = measure(model, calibration=calibration)
    for kept in (KEPT, {"conv1": (6,)}):
        expected = by_hand(model, kept, validation(), calibration)
        assert judge.masked(kept) == pytest.approx(expected, rel=2e-5)
        assert judge.pruned(kept) == pytest.approx(expected, rel=2e-5)
    if recalibrated:
        assert abs(expected / by_hand(model, kept, validation()) - 1) > 1e-2


def test_a_residual_network():
    model = toys.residual()
    data = (toys.images(30), toys.labels(30))
    kept = {g.name: range(g.width // 2) for g in tfprune.analyse(model).prunable}
    calibration = toys.images(50, seed=5)
    judge = measure(model, calibration=calibration, data=data)
    expected = by_hand(model, kept, data, calibration)
    assert judge.masked(kept) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("recalibrated", [False, True])
def test_normalisation_across_channels(recalibrated):
    """Layer normalisation leaves removed channels out; what follows is estimated on that."""
    inputs = keras.Input((6, 6, 2))
    x = keras.layers.Conv2D(8, 3, name="first")(inputs)
    x = keras.layers.LayerNormalization(name="across")(x)
    x = keras.layers.Conv2D(6, 3, name="second")(x)
    x = keras.layers.BatchNormalization(name="along")(x)
    x = keras.layers.GlobalAveragePooling2D(name="average")(keras.layers.ReLU(name="relu")(x))
    model = randomize(keras.Model(inputs, keras.layers.Dense(3, name="last")(x)))
    kept = {"first": (0, 3, 4), "second": (1, 2)}
    calibration = examples(75, seed=2)[0] if recalibrated else None
    judge = measure(model, calibration=calibration)
    expected = by_hand(model, kept, validation(), calibration)
    assert judge.masked(kept) == pytest.approx(expected, rel=2e-5)


def test_nothing_stays_from_one_candidate_to_the_next():
    model = trained()
    before = model.get_weights()
    judge = measure(model, calibration=examples(75, seed=2)[0])
    dense = judge.masked({})
    first, second = judge.masked(KEPT), judge.masked({"conv0": (1,)})
    assert len({dense, first, second}) == 3
    assert judge.masked(KEPT) == first and judge.masked({}) == dense
    assert measure(model, calibration=examples(75, seed=2)[0]).masked({"conv0": (1,)}) == second
    for weight, value in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, value)
    x, y = validation()
    as_it_is = squares(y, model.predict(x, verbose=0))
    assert measure(model).masked({}) == pytest.approx(as_it_is, rel=2e-5) != dense
    assert judge.dense() == measure(model).dense() == measure(model).masked({})


def test_new_values_for_weights():
    model = trained()
    graph = tfprune.analyse(model)
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 4)).astype("float32")
    values = {"conv2/kernel": kernel}
    small = PruningPlan.of(graph, KEPT, values=values).apply(model)
    x, y = validation()
    expected = squares(y, small.predict(x, verbose=0))
    judge = measure(model)
    assert judge.masked(KEPT, values) == pytest.approx(expected, rel=2e-5)
    assert judge.pruned(KEPT, values) == pytest.approx(expected, rel=2e-5)


def test_several_inputs_and_outputs():
    left, right = keras.Input((4,), name="left"), keras.Input((3,), name="right")
    x = keras.layers.Concatenate(name="both")(
        [keras.layers.Dense(6, name="of_left")(left), keras.layers.Dense(5, name="of_right")(right)]
    )
    outputs = [keras.layers.Dense(2, name="one")(x), keras.layers.Dense(1, name="other")(x)]
    model = keras.Model({"left": left, "right": right}, outputs)
    generator = np.random.default_rng(0)
    x = {"right": generator.normal(size=(30, 3)), "left": generator.normal(size=(30, 4))}
    y = {"sum": np.arange(30)}
    metric = Metric(lambda labels, found: labels["sum"].sum() + found[0].sum() + found[1].sum(),
                    larger_is_better=True)  # fmt: skip
    kept = {"of_left": (0, 2), "of_right": (4,)}
    small = PruningPlan.of(tfprune.analyse(model), kept).apply(model)
    one, other = small.predict(x, verbose=0)
    found = measure(model, metric, data=(x, y)).masked(kept)
    assert found == pytest.approx(435 + one.sum() + other.sum(), rel=1e-4)
    with pytest.raises(ArgumentError, match="one output"):
        resolve_metric(model, None, y)


def outputs_model(shape, classes, activation=None):
    inputs = keras.Input(shape)
    return keras.Model(inputs, keras.layers.Dense(classes, activation=activation)(inputs))


@pytest.mark.parametrize(
    ("shape", "classes", "activation", "labels", "outputs", "accuracy"),
    [
        # class numbers, in two shapes
        ((2,), 3, None, [0, 1, 2, 1], [[3, 1, 2], [0, 0, 9], [1, 2, 3], [0, 1, 0]], 0.75),
        ((2,), 3, "softmax", [[0], [1]], [[3, 1, 2], [0, 0, 9]], 0.5),
        # one-hot rows
        ((2,), 3, None, [[1, 0, 0], [0, 0, 1]], [[3, 1, 2], [0, 0, 9]], 1.0),
        # a sigmoid unit
        ((2,), 1, "sigmoid", [0, 1, 1, 0], [[0.2], [0.6], [0.4], [0.5]], 0.75),
        ((2,), 1, "sigmoid", [[0], [1]], [[0.7], [0.6]], 0.5),
        # a class per place
        ((2, 2), 2, None, [[0, 1], [1, 1]], [[[1, 0], [0, 1]], [[1, 0], [1, 0]]], 0.5),
        # NaN is never right
        ((2,), 2, None, [0, 0], [[np.nan, 0], [1, 0]], 0.5),
        ((2,), 1, "sigmoid", [0, 0], [[np.nan], [0.1]], 0.5),
    ],
)  # fmt: skip
def test_accuracy(shape, classes, activation, labels, outputs, accuracy):
    labels = np.array(labels)
    metric = resolve_metric(outputs_model(shape, classes, activation), None, labels)
    assert metric(labels, np.array(outputs, np.float32)) == accuracy
    assert metric.name == "accuracy" and metric.larger_is_better
    again = pickle.loads(pickle.dumps(metric))
    assert again(labels, np.array(outputs, np.float32)) == accuracy


@pytest.mark.parametrize(
    ("classes", "activation", "labels", "message"),
    [
        (1, None, [0.3, 0.1], "sigmoid"),
        (1, "sigmoid", [0.3, 1], "labels are 0 and 1"),
        (1, "sigmoid", [[0, 1]], r"labels of shape \(1, 2\)"),
        (3, None, [0, 3], "from 0 to 2"),
        (3, None, [-1, 0], "from 0 to 2"),
        (3, None, [0.5, 1], "from 0 to 2"),
        (3, None, [[1, 1, 0]], "one-hot"),
        (3, None, [[0.5, 0.5, 0]], "one-hot"),
        (3, None, [[0, 1]], "one-hot"),
        (3, None, [[[0], [1]]], "from 0 to 2"),
    ],
)
def test_no_classifier(classes, activation, labels, message):
    with pytest.raises(ArgumentError, match=f"{message}.*tfprune.search.Metric"):
        resolve_metric(outputs_model((2,), classes, activation), None, np.array(labels))


@pytest.mark.parametrize(
    ("function", "larger"),
    [
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), False),
        (keras.metrics.SparseCategoricalAccuracy(), True),
        (keras.losses.sparse_categorical_crossentropy, False),
        (tf_keras.metrics.SparseTopKCategoricalAccuracy(k=2), True),
    ],
    ids=["loss", "metric", "function", "tf_keras"],
)
def test_metrics_of_keras(function, larger):
    metric = Metric(function, larger)
    y, outputs = np.array([0, 1, 2]), np.array([[2, 1, 0], [0, 1, 0], [0.5, 0.4, 0.1]], np.float32)
    value = metric(y, outputs)
    assert metric(y, outputs) == value  # nothing adds up
    again = pickle.loads(pickle.dumps(metric))
    assert again(y, outputs) == value and again.name == metric.name
    if larger:
        assert value == pytest.approx(2 / 3)


def test_which_way_is_better():
    assert Metric(squares, larger_is_better=True).drop(0.9, 0.7) == pytest.approx(0.2)
    assert Metric(squares, larger_is_better=False).drop(0.9, 0.7) == pytest.approx(-0.2)
    assert Metric(squares, False).name == "squares"
    assert Metric(squares, False, "distance").name == "distance"
    assert resolve_metric(None, DISTANCE, None) is DISTANCE


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Metric("mse", False), "Received: 'mse'"),
        (lambda: Metric(keras.losses.MeanSquaredError, False), "Received: <class"),
        (lambda: Metric(squares, None), "larger_is_better"),
        (lambda: resolve_metric(None, "mse", None), "Received: 'mse'"),
        (lambda: resolve_metric(None, squares, None), "to be a Metric"),
    ],
)  # fmt: skip
def test_no_metric(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_number_that_is_none():
    with pytest.raises(DataError, match=r"finite undefined.*nan"):
        Metric(lambda y, p: np.nan, True, "undefined")(None, None)
