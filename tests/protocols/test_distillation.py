"""What a student learns from a teacher."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from tfprune.errors import ArgumentError, ModelError
from tfprune.graph.trace import is_compiled
from tfprune.protocols import Distillation, fine_tune
from tfprune.protocols.distillation import divergence, logits

from .models import classifier, examples
from .test_resuming import interrupting, same

TRAIN, VALIDATION = examples(60, seed=0), examples(30, seed=1)
BOTH = pytest.mark.parametrize("framework", [keras, tf_keras], ids=["keras", "tf_keras"])


def tune(model, teacher, train=TRAIN, validation=None, **options):
    return fine_tune(
        model, train, validation, teacher=teacher, **{"epochs": 1, "verbose": 0, **options}
    )


def linear(framework, *, softmax: bool = False, seed: int = 0, scale: float = 1.0):
    """Five numbers to three classes."""
    initial = framework.initializers.RandomNormal(stddev=scale, seed=seed)
    return framework.Sequential(
        [
            framework.layers.Input((5,)),
            framework.layers.Dense(
                3, kernel_initializer=initial, activation="softmax" if softmax else None
            ),
        ]
    )


def small(framework, *, dropout: float = 0.0, seed: int = 0):
    """For the images; quicker to compile than one with a convolution."""
    return framework.Sequential(
        [
            framework.layers.Input((6, 6, 2)),
            framework.layers.Flatten(),
            framework.layers.Dropout(dropout),
            framework.layers.Dense(
                3, kernel_initializer=framework.initializers.GlorotUniform(seed=seed)
            ),
        ]
    )


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def by_hand(z, z_teacher, y, temperature, weight):
    """The two parts of the loss, means over the examples, and the gradient by the logits."""
    p, q = softmax(z_teacher / temperature), softmax(z / temperature)
    hard = -np.log(softmax(z)[np.arange(len(y)), y])
    soft = temperature**2 * (p * np.log(p / q)).sum(axis=-1)
    gradient = (1 - weight) * (softmax(z) - np.eye(3)[y]) + weight * temperature * (q - p)
    return hard.mean(), soft.mean(), gradient / len(y)


def test_the_golden_figures_of_the_sheet() -> None:
    z_t, z_s = np.array([[3.0, 1, 0]], np.float32), np.array([[1.0, 2, 0]], np.float32)
    soft = float(divergence(z_t, z_s, temperature=4.0)[0])
    hard, _, _ = by_hand(z_s.astype(float), z_t.astype(float), np.array([0]), 4.0, 0.9)
    # Six digits are printed; the divergence is a difference of float32 logarithms, times 16.
    assert soft == pytest.approx(0.881179, abs=2e-6)
    assert hard == pytest.approx(1.407606, abs=1e-6)
    assert 0.1 * hard + 0.9 * soft == pytest.approx(0.933821, abs=2e-6)


@pytest.mark.parametrize(
    ("framework", "temperature", "weight", "student_softmax", "teacher_softmax"),
    [
        pytest.param(keras, 4.0, 0.9, False, True, id="keras, logits"),
        pytest.param(keras, 20.0, 1.0, True, False, id="keras, softmax"),
        pytest.param(tf_keras, 1.0, 0.3, True, False, id="tf_keras, softmax"),
    ],
)
def test_one_step_is_the_formula(
    framework, temperature, weight, student_softmax, teacher_softmax
) -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 5)).astype(np.float32)
    y = generator.integers(0, 3, 40)
    model = linear(framework, softmax=student_softmax, seed=1)
    teacher = linear(framework, softmax=teacher_softmax, seed=2, scale=2.0)
    kernel = model.get_weights()[0].astype(float)
    z, z_teacher = x @ kernel, x @ teacher.get_weights()[0].astype(float)
    hard, soft, gradient = by_hand(z, z_teacher, y, temperature, weight)
    decay = {"weight_decay": 0.5} if framework is keras else {}
    record = tune(
        model,
        teacher,
        (x, y),
        (x[:7], y[:7]),
        learning_rate=0.1,
        batch_size=40,
        distillation=Distillation(temperature, weight),
        **decay,
    )
    penalty = 0.25 * (kernel**2).sum() if decay else 0.0
    # Float32 losses of 40 examples; at T = 20 the divergence is a difference of logarithms that
    # agree in two digits, times 400.
    history = {key: series[0] for key, series in record.history.items()}
    assert history["student_loss"] == pytest.approx(hard, rel=1e-5)
    assert history["distillation_loss"] == pytest.approx(soft, rel=1e-4)
    total = (1 - weight) * hard + weight * soft + penalty
    assert history["loss"] == pytest.approx(total, rel=1e-4)
    # The penalty is not the teacher's: it keeps its full weight.
    expected = kernel - 0.1 * (x.T @ gradient + (0.5 * kernel if decay else 0))
    np.testing.assert_allclose(model.get_weights()[0], expected, rtol=1e-4, atol=1e-5)
    # The validation loss is the model's own.
    weights = [w.astype(float) for w in model.get_weights()]
    own, _, _ = by_hand(x[:7] @ weights[0] + weights[1], z_teacher[:7], y[:7], 1, 0)
    extra = 0.25 * sum((w**2).sum() for w in weights) if decay else 0
    assert history["val_loss"] == pytest.approx(own + extra, rel=1e-4)
    assert "val_distillation_loss" not in record.history


@BOTH
def test_the_student_comes_back_plain_and_the_teacher_untouched(framework) -> None:
    model, teacher = small(framework), classifier(framework, dropout=0.5, seed=4)
    teacher.trainable = False
    before = teacher.get_weights()
    given = framework.losses.SparseCategoricalCrossentropy(from_logits=True)
    record = tune(model, teacher, TRAIN, VALIDATION, loss=given, metrics=["accuracy"])
    assert all(np.array_equal(a, b) for a, b in zip(before, teacher.get_weights(), strict=True))
    assert not teacher.trainable and not is_compiled(teacher)
    assert "train_step" not in vars(model)
    assert "call" not in vars(given) and "call" not in vars(model.loss)
    assert type(model) is framework.Sequential
    # What is fitted and evaluated now knows no teacher.
    x, y = VALIDATION
    loss, accuracy = model.evaluate(x, y, verbose=0)
    # Float32 means over other batches.
    assert loss == pytest.approx(float(given(y, model(x, training=False))), rel=1e-5)
    assert loss == pytest.approx(record.history["val_loss"][-1], rel=1e-4)
    assert accuracy == pytest.approx(record.history["val_accuracy"][-1])
    fitted = model.fit(x, y, batch_size=30, verbose=0)
    assert set(fitted.history) == {"loss", "accuracy"}
    assert fitted.history["loss"][0] == pytest.approx(loss, rel=1e-4)


def test_the_teacher_answers_in_inference_mode() -> None:
    """Its batch normalisation uses moving statistics, and its dropout is off."""
    x, y = TRAIN
    model, teacher = small(keras), classifier(keras, dropout=0.5, seed=4)
    z, z_teacher = (m(x, training=False).numpy().astype(float) for m in (model, teacher))
    record = tune(model, teacher, batch_size=60)
    _, soft, _ = by_hand(z, z_teacher, y, 4.0, 0.9)
    # Float32 sums of 60 examples.
    assert record.history["distillation_loss"][0] == pytest.approx(soft, rel=1e-4)


def test_weight_0_is_plain_training() -> None:
    plain, model = small(keras), small(keras)
    options = {"epochs": 2, "verbose": 0, "batch_size": 16, "learning_rate": 0.02}
    expected = fine_tune(plain, TRAIN, **options)
    record = tune(model, small(keras, seed=4), **options, distillation=Distillation(weight=0.0))
    assert same(model, plain) and record.history == expected.history
    assert not same(model, small(keras))


def test_resuming_is_exact(tmp_path) -> None:
    path = tmp_path / "run.npz"
    teacher = small(keras, seed=4)
    options = {"epochs": 3, "schedule": "cosine", "learning_rate": 0.02, "batch_size": 16}
    straight, model = small(keras, dropout=0.5), small(keras, dropout=0.5)
    whole = tune(straight, teacher, **options)
    stop = interrupting(keras, 2, 1)
    with pytest.raises(KeyboardInterrupt):
        tune(model, teacher, **options, checkpoint=path, callbacks=[stop])
    assert "train_step" not in vars(model) and "call" not in vars(model.loss)
    resumed = tune(model, teacher, **options, checkpoint=path)
    assert same(model, straight) and resumed.history == whole.history
    assert resumed.resumed_from == 2
    for change, message in (
        ({"teacher": small(keras, seed=5)}, "teacher: '"),
        ({"distillation": Distillation(temperature=2.0)}, r"distillation: \[4.0, 0.9\] there"),
        ({"teacher": None}, "None here"),
    ):
        with pytest.raises(ArgumentError, match=f"another run.*{message}"):
            tune(**{"model": model, "teacher": teacher, **options, **change}, checkpoint=path)


def test_logits_of_a_softmax_differ_by_a_constant_however_small_a_probability() -> None:
    z = np.array([[0.0, -30, -60, -80], [50, 45, 0, 0]], np.float32)
    recovered = logits(tf.nn.softmax(z), from_softmax=True).numpy()
    # Float32 softmax and logarithm: relative errors of 1e-7, of numbers up to 80.
    np.testing.assert_allclose(recovered - recovered[:, :1], z - z[:, :1], atol=3e-5)
    assert np.isfinite(logits(np.zeros((1, 3), np.float32), from_softmax=True)).all()


def test_half_precision_computes_the_divergence_in_float32() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model, softened = small(keras), classifier(keras, softmax=True)
    finally:
        keras.config.set_dtype_policy("float32")
    teacher = small(keras, seed=4)
    record = tune(model, teacher, epochs=2, learning_rate=0.02, batch_size=10)
    soft = record.history["distillation_loss"]
    assert soft[-1] < soft[0]
    assert divergence(*[tf.constant([[1.0, 2]])] * 2, temperature=2.0).dtype == tf.float32
    with pytest.raises(ArgumentError, match=r"softmax in half precision.*dtype='float32'"):
        tune(softened, teacher)
    with pytest.raises(ArgumentError, match=r"The teacher .*softmax in half precision"):
        tune(classifier(keras), softened)


class Stubborn(keras.Sequential):
    """A model whose training does not look at the compiled loss."""

    def train_step(self, data):
        x, _ = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(self(x, training=True) ** 2)
        weights = self.trainable_weights
        self.optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return {"loss": loss}


def test_a_train_step_that_ignores_the_loss_is_told() -> None:
    model = Stubborn([keras.Input((6, 6, 2)), keras.layers.Flatten(), keras.layers.Dense(3)])
    before = model.get_weights()
    with pytest.raises(ModelError, match=r"self\.compute_loss"):
        tune(model, small(keras))
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert "train_step" not in vars(model)


def ending(*last, shape=(6, 6, 2)):
    return keras.Sequential([keras.Input(shape), keras.layers.Flatten(), *last])


def shared():
    model = small(keras)
    return model, keras.Model(model.inputs, model.outputs)


@pytest.mark.parametrize(
    ("pair", "error", "message"),
    [
        (shared, ArgumentError, "weights that the student trains.*copy"),
        (lambda: (small(keras), small(tf_keras)), ModelError, "of tf_keras"),
        (lambda: (small(keras), "resnet"), ModelError, "str of no Keras"),
        (
            lambda: (small(keras), ending(keras.layers.Dense(4))),
            ArgumentError,
            r"student's outputs; received \(None, 4\).*\(None, 3\)",
        ),
        (
            lambda: (small(keras), ending(keras.layers.Dense(3), shape=(5, 5, 2))),
            ArgumentError,
            "student's inputs",
        ),
        (
            lambda: (ending(keras.layers.Dense(3, activation="sigmoid")), small(keras)),
            ArgumentError,
            "the student .*'sigmoid'",
        ),
        (
            lambda: (small(keras), ending(keras.layers.Dense(3), keras.layers.ReLU())),
            ArgumentError,
            r"the teacher .*activation None.*Activation\('linear'\)",
        ),
        (
            lambda: (ending(keras.layers.Dense(1)), ending(keras.layers.Dense(1))),
            ArgumentError,
            "softmax of two",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(pair, error, message: str) -> None:
    model, teacher = pair()
    with pytest.raises(error, match=message):
        tune(model, teacher)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "positive temperature; received 0.0"),
        ({"temperature": float("inf")}, "positive temperature"),
        ({"weight": 1.1}, "weight from 0 to 1; received 1.1"),
        ({"weight": float("nan")}, "weight from 0 to 1"),
    ],
)
def test_values_out_of_range_are_refused(values, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Distillation(**values)


def test_distillation_needs_a_teacher_and_a_loss_object() -> None:
    with pytest.raises(ArgumentError, match="Expected a teacher"):
        tune(small(keras), None, distillation=Distillation())
    with pytest.raises(ArgumentError, match=r"object of keras.losses.*received 'mse'"):
        tune(small(keras), small(keras, seed=1), loss="mse")
