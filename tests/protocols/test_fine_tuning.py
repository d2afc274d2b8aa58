"""What fine-tuning does to a model, and what it reports."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from tfprune.errors import ArgumentError, DataError, ModelError
from tfprune.protocols import FineTuneRecord, fine_tune

from .models import classifier, examples

TRAIN, VALIDATION = examples(60, seed=0), examples(30, seed=1)


def tune(model, train=TRAIN, validation=None, **options) -> FineTuneRecord:
    return fine_tune(model, train, validation, **{"epochs": 1, "verbose": 0, **options})


@pytest.mark.parametrize("framework", [keras, tf_keras], ids=["keras", "tf_keras"])
@pytest.mark.parametrize("softmax", [False, True])
def test_it_learns_and_says_how_it_went(framework, softmax: bool) -> None:
    model = classifier(framework, softmax=softmax)
    record = tune(model, TRAIN, VALIDATION, epochs=5, learning_rate=0.01, batch_size=16)
    assert record.epochs == 5 and not record.stopped_early and record.resumed_from == 0
    assert set(record.history) == {
        *("loss", "accuracy", "val_loss", "val_accuracy", "learning_rate")
    }
    assert all(len(series) == 5 for series in record.history.values())
    # Three classes, told apart by the brighter half; the dense layer alone can do it.
    assert record.history["accuracy"][-1] > 0.8 > record.history["accuracy"][0]
    accuracies = record.history["val_accuracy"]
    assert record.best_epoch == accuracies.index(max(accuracies))
    assert record.seconds > 0
    # The reported figures are those of the weights that the model has now.
    loss, accuracy = model.evaluate(*VALIDATION, verbose=0)
    assert accuracy == pytest.approx(accuracies[-1])
    # Float32 sums over other batches.
    assert loss == pytest.approx(record.history["val_loss"][-1], rel=1e-4)


def test_one_step_is_sgd_with_the_papers_weight_decay() -> None:
    """w - lr (g + wd w) for every trainable variable, batch normalisation and biases included."""
    model, twin = classifier(keras), classifier(keras)
    x, y = TRAIN
    with tf.GradientTape() as tape:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(
            y, twin(x, training=True)
        )
    gradients = tape.gradient(loss, [v.value for v in twin.trainable_variables])
    before = [v.numpy() for v in model.trainable_variables]
    tune(model, learning_rate=0.1, weight_decay=0.5, batch_size=60)
    for old, gradient, new in zip(before, gradients, model.trainable_variables, strict=True):
        expected = old - 0.1 * (gradient.numpy() + 0.5 * old)
        # Batch order differs, so float32 sums of 60 examples do.
        np.testing.assert_allclose(new.numpy(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("framework", [keras, tf_keras], ids=["keras", "tf_keras"])
def test_decoupled_weight_decay_spares_all_but_kernels(framework) -> None:
    plain, decayed = classifier(framework), classifier(framework)
    tune(plain, learning_rate=0.1, batch_size=60)
    tune(decayed, learning_rate=0.1, batch_size=60, weight_decay=0.5, decay="decoupled")
    start = classifier(framework).trainable_variables
    for old, without, with_decay in zip(
        start, plain.trainable_variables, decayed.trainable_variables, strict=True
    ):
        extra = 0.1 * 0.5 * old.numpy() if len(old.shape) > 1 else 0
        np.testing.assert_allclose(
            with_decay.numpy(), without.numpy() - extra, rtol=1e-5, atol=1e-6
        )


def test_the_penalty_is_taken_off_again() -> None:
    model = classifier(keras)
    model.layers[1].kernel.regularizer = own = keras.regularizers.L1(0.1)
    tune(model, weight_decay=0.5)
    assert model.layers[1].kernel.regularizer is own
    assert all(v.regularizer is None for v in model.trainable_variables[1:])
    # Nor does it live on in what was traced: the loss is the data's and the layer's own.
    x, y = TRAIN
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(
        y, model.predict(x, verbose=0)
    )
    own_penalty = 0.1 * np.abs(model.layers[1].kernel.numpy()).sum()
    assert model.evaluate(x, y, verbose=0)[0] == pytest.approx(float(loss) + own_penalty, rel=1e-4)


def test_a_given_optimizer_is_copied() -> None:
    given = keras.optimizers.Adam(learning_rate=1.0, beta_1=0.5)
    model = classifier(keras)
    tune(model, optimizer=given, learning_rate=0.01)
    assert model.optimizer is not given and not given.built
    assert model.optimizer.beta_1 == 0.5
    assert float(model.optimizer.learning_rate.numpy()) == pytest.approx(0.01)
    assert float(given.learning_rate.numpy()) == 1.0


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1, 1, 1, 1]),
        ("cosine", [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
        ("step", [1, 1, 0.1, 0.01]),
        (lambda progress: 1 - progress, [1, 0.75, 0.5, 0.25]),
    ],
)
def test_schedules(schedule, expected) -> None:
    seen = []
    model = classifier(keras)
    watch = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: seen.append(
            float(model.optimizer.learning_rate.numpy())
        )
    )
    record = tune(model, epochs=4, learning_rate=0.2, schedule=schedule, callbacks=[watch])
    # Half-cosines in float64.
    np.testing.assert_allclose(
        record.history["learning_rate"], 0.2 * np.array(expected), rtol=1e-12
    )
    # The optimizer's variable is a float32.
    np.testing.assert_allclose(seen, 0.2 * np.array(expected), rtol=1e-6)


def test_the_seed_fixes_the_outcome() -> None:
    outcomes = []
    for seed in (1, 1, 2):
        model = classifier(keras, dropout=0.5)
        tune(model, seed=seed, epochs=2, batch_size=16)
        outcomes.append(model.get_weights())
    first, same, other = outcomes
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_global_random_states_are_left_alone() -> None:
    np.random.seed(7)
    expected = np.random.RandomState(7).rand()
    tune(classifier(keras, dropout=0.5))
    assert np.random.rand() == expected


def test_callbacks_see_one_training() -> None:
    calls = []
    names = ("on_train_begin", "on_epoch_begin", "on_epoch_end", "on_train_end")

    class Recorder(keras.callbacks.Callback):
        def __getattribute__(self, name):
            if name in names:
                calls.append(name)
            return super().__getattribute__(name)

    reported = []
    tune(
        classifier(keras),
        epochs=3,
        callbacks=[Recorder()],
        on_epoch_end=lambda epoch, values: reported.append((epoch, values["learning_rate"])),
    )
    assert calls == [names[0], *[names[1], names[2]] * 3, names[3]]
    assert reported == [(0, 1e-3), (1, 1e-3), (2, 1e-3)]


def test_a_callback_can_stop() -> None:
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 1

    record = tune(classifier(keras), epochs=5, callbacks=[Stop()])
    assert record.epochs == 2 and record.stopped_early


def test_patience_and_the_best_weights_go_by_validation() -> None:
    # Validation labels that the training contradicts: the accuracy falls from the first epochs on.
    x, y = VALIDATION
    wrong = (x, (y + 1) % 3)
    seen = []
    model = classifier(keras, seed=3)
    record = tune(
        model,
        TRAIN,
        wrong,
        epochs=30,
        learning_rate=0.02,
        patience=2,
        restore_best=True,
        on_epoch_end=lambda epoch, values: seen.append(model.get_weights()),
    )
    accuracies = record.history["val_accuracy"]
    assert record.stopped_early and record.epochs == record.best_epoch + 3 < 30
    assert accuracies[record.best_epoch] == max(accuracies) > accuracies[-1]
    best = seen[record.best_epoch]
    assert all(np.array_equal(a, b) for a, b in zip(model.get_weights(), best, strict=True))
    assert record.restored_best


@pytest.mark.parametrize("form", ["arrays", "dataset", "function", "dictionary", "one-hot"])
def test_every_kind_of_data(form: str) -> None:
    x, y = TRAIN
    train = {
        "arrays": (x, y),
        "dataset": tf.data.Dataset.from_tensor_slices((x, y)).batch(20),
        "function": lambda epoch: tf.data.Dataset.from_tensor_slices((x, y)).batch(20 + epoch),
        "dictionary": ({"image": x}, y),
        "one-hot": (x, np.eye(3, dtype=np.float32)[y]),
    }[form]
    model = classifier(keras)
    if form == "dictionary":
        image = keras.Input((6, 6, 2), name="image")
        model = keras.Model({"image": image}, model(image))
    record = tune(model, train, epochs=4, learning_rate=0.02, batch_size=20)
    assert record.history["accuracy"][-1] > record.history["accuracy"][0]


def test_several_inputs_in_a_list() -> None:
    a, b = keras.Input((6, 6, 2)), keras.Input((1,))
    x = keras.layers.Concatenate()([keras.layers.Flatten()(a), b])
    model = keras.Model([a, b], keras.layers.Dense(3, activation="softmax")(x))
    images, labels = TRAIN
    record = tune(model, ([images, labels[:, None].astype(np.float32)], labels))
    assert record.epochs == 1


def test_arrays_come_in_another_order_every_epoch() -> None:
    from tfprune.protocols.training_data import training_data

    data = training_data(TRAIN, batch_size=60, seed=0, finished=0, input_shape=None)
    orders = [next(iter(data.epoch(epoch)))[1].numpy() for epoch in (0, 1, 0)]
    assert np.array_equal(orders[0], orders[2]) and not np.array_equal(orders[0], orders[1])
    assert data.steps == 1
    assert all(np.array_equal(np.sort(order), np.sort(TRAIN[1])) for order in orders)


def test_one_sigmoid_unit_is_a_binary_classifier() -> None:
    x, y = TRAIN
    image = keras.Input((6, 6, 2))
    output = keras.layers.Dense(1, activation="sigmoid", kernel_initializer="zeros")(
        keras.layers.Flatten()(image)
    )
    model = keras.Model(image, output)
    record = tune(model, (x, (y == 0).astype(np.float32)[:, None]), epochs=5, learning_rate=0.05)
    assert record.history["accuracy"][-1] > 0.8


def test_an_explicit_loss_needs_no_classifier() -> None:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    x = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    record = tune(model, (x, x.sum(axis=1)), loss="mse", epochs=30, learning_rate=0.05)
    assert set(record.history) == {"loss", "learning_rate"}
    # Least squares with an exact solution: gradient descent converges to it.
    assert record.history["loss"][-1] < 0.1 * record.history["loss"][0]
    assert record.best_epoch is None


def nested(last) -> keras.Model:
    image = keras.Input((4,))
    return keras.Model(image, keras.Sequential([keras.Input((4,)), *last])(image))


@pytest.mark.parametrize(
    ("model", "from_logits"),
    [
        (lambda: nested([keras.layers.Dense(3)]), True),
        (lambda: nested([keras.layers.Dense(3), keras.layers.Softmax()]), False),
        (lambda: nested([keras.layers.Dense(3), keras.layers.Activation("softmax")]), False),
        (lambda: nested([keras.layers.Dense(3, activation="softmax")]), False),
        (lambda: functional(lambda x: keras.ops.softmax(x)), False),
        (lambda: functional(lambda x: keras.layers.Activation("linear")(x)), True),
    ],
)
def test_the_loss_follows_the_last_activation(model, from_logits: bool) -> None:
    from tfprune.losses import classification_loss

    loss = classification_loss(keras, model(), (None,))
    assert isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
    assert loss.from_logits is from_logits


def functional(last) -> keras.Model:
    image = keras.Input((4,))
    return keras.Model(image, last(keras.layers.Dense(3)(image)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: functional(keras.layers.ReLU()), "activation None.*Give the loss"),
        (lambda: functional(keras.layers.Activation("relu")), "activation 'relu'"),
        (lambda: functional(keras.layers.Dense(1)), "may be a regression"),
        (lambda: functional(lambda x: [x, x]), "not one output"),
    ],
)
def test_a_loss_is_not_guessed(model, message: str) -> None:
    x = np.zeros((4, 4), np.float32)
    with pytest.raises(ArgumentError, match=message):
        tune(model(), (x, np.zeros(4, np.int32)))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (TRAIN[0], "training data have no labels"),
        ((TRAIN[0], None), "training data have no labels"),
        (tf.data.Dataset.from_tensors(TRAIN[0]), "no labels.*TensorSpec"),
        ((TRAIN[0][:0], TRAIN[1][:0]), "empty"),
        (tf.data.Dataset.from_tensors(TRAIN).take(0), "training data are empty"),
        (tf.data.Dataset.from_tensors(TRAIN).repeat(), r"no end.*\.take"),
        ((TRAIN[0], TRAIN[1][:5]), "first axis"),
        ((TRAIN[0][:, :5], TRAIN[1]), r"\(None, 6, 6, 2\); received \(1, 5, 6, 2\)"),
        (tf.data.Dataset.from_tensor_slices(TRAIN), r"not to be batched: use \.batch\(n\)"),
        (lambda epoch: TRAIN, "the tf.data.Dataset of an epoch; it returned tuple"),
        ("cifar10", "Received str"),
    ],
)
def test_bad_training_data_are_refused(train, message: str) -> None:
    model = classifier(keras)
    before = model.get_weights()
    with pytest.raises(DataError, match=message):
        tune(model, train)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_bad_validation_data_are_refused() -> None:
    with pytest.raises(DataError, match="validation data have no labels"):
        tune(classifier(keras), TRAIN, VALIDATION[0])
    with pytest.raises(DataError, match="none were given"):
        tune(classifier(keras), patience=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs of at least 1; received 0"),
        ({"batch_size": 0}, "batch_size of at least 1"),
        ({"patience": 0}, "patience of at least 1"),
        ({"learning_rate": 0.0}, "positive learning_rate"),
        ({"learning_rate": float("nan")}, "positive learning_rate"),
        ({"weight_decay": -1.0}, "weight_decay from 0"),
        ({"decay": "L2"}, "'l2' or 'decoupled'; received 'L2'"),
        ({"schedule": "linear"}, "'constant', 'cosine', 'step'.*'linear'"),
        ({"schedule": lambda progress: -1.0}, "factor -1.0"),
        ({"optimizer": "momentum"}, "'sgd', 'adam'.*'momentum'"),
        ({"optimizer": tf_keras.optimizers.SGD()}, "one of keras.optimizers"),
        (
            {"optimizer": keras.optimizers.SGD(), "weight_decay": 0.1, "decay": "decoupled"},
            "part of the optimizer",
        ),
        ({"seed": -1}, "seed from 0"),
    ],
)
def test_bad_arguments_are_refused(options, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        tune(classifier(keras), **options)


def test_tf_keras_cannot_carry_the_penalty() -> None:
    with pytest.raises(ArgumentError, match=r"Keras 3 models only.*decoupled"):
        tune(classifier(tf_keras), weight_decay=0.1)


def test_what_is_no_built_model_is_refused() -> None:
    with pytest.raises(ModelError, match="no weights yet"):
        tune(keras.Sequential([keras.layers.Dense(2)]))
    with pytest.raises(ModelError, match="received str"):
        tune("resnet")


def test_mixed_precision_with_loss_scaling(tmp_path) -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = classifier(keras)
    finally:
        keras.config.set_dtype_policy("float32")
    record = tune(model, epochs=3, learning_rate=0.02, checkpoint=tmp_path / "run")
    assert type(model.optimizer).__name__ == "LossScaleOptimizer"
    assert record.history["accuracy"][-1] > record.history["accuracy"][0]
