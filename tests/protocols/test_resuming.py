"""A run that is interrupted and resumed ends in the very same weights."""

import json
import os

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from tfprune.errors import ArgumentError
from tfprune.protocols import checkpoint, fine_tune

from .models import classifier, examples

TRAIN, VALIDATION = examples(60, seed=0), examples(30, seed=1)
OPTIONS = {
    "epochs": 4,
    "learning_rate": 0.02,
    "schedule": "cosine",
    "batch_size": 16,
    "seed": 5,
    "verbose": 0,
}


def interrupting(framework, epoch: int, batch: int):
    """A callback that presses Ctrl-C in the middle of an epoch."""

    class Interrupt(framework.callbacks.Callback):
        def on_epoch_begin(self, number, logs=None):
            self.number = number

        def on_train_batch_end(self, number, logs=None):
            if (self.number, number) == (epoch, batch):
                raise KeyboardInterrupt

    return Interrupt()


def same(first, second) -> bool:
    return all(
        np.array_equal(a, b) for a, b in zip(first.get_weights(), second.get_weights(), strict=True)
    )


def shuffling():
    """A dataset with all its randomness in tf.data, made anew as by a new process."""
    dataset = tf.data.Dataset.from_tensor_slices(TRAIN).shuffle(60, seed=3).batch(16)
    return dataset.prefetch(2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> bytes:
    """The checkpoint of a finished run."""
    path = tmp_path_factory.mktemp("finished") / "run.npz"
    fine_tune(classifier(keras), TRAIN, **OPTIONS, checkpoint=path)
    return path.read_bytes()


def by_epoch(epoch: int):
    return tf.data.Dataset.from_tensor_slices(TRAIN).shuffle(60, seed=epoch).batch(16)


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        ("arrays", (0, 1)),
        ("function", (2, 1)),
        ("dataset", (2, 1)),
        ("dataset of unknown length", (1, 3)),
    ],
)
def test_resuming_is_exact(kind: str, where, tmp_path) -> None:
    def data():
        return {
            "arrays": TRAIN,
            "function": by_epoch,
            "dataset": shuffling(),
            "dataset of unknown length": shuffling().filter(lambda x, y: True),
        }[kind]

    path = tmp_path / "run.npz"
    options = {**OPTIONS, "weight_decay": 1e-2, "optimizer": "adam"}
    straight = classifier(keras, dropout=0.5)
    whole = fine_tune(straight, data(), VALIDATION, **options)

    model = classifier(keras, dropout=0.5)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(
            model,
            data(),
            VALIDATION,
            **options,
            checkpoint=path,
            callbacks=[interrupting(keras, *where)],
        )
    # The interrupted model is in the middle of an epoch, and nothing is half-written.
    assert os.listdir(tmp_path) == ["run.npz"]
    assert not same(model, straight)
    if where[0] == 2:
        # A new process has a new model, which may start from anywhere; a notebook has the old one.
        model = classifier(keras, dropout=0.5, seed=9)
    resumed = fine_tune(model, data(), VALIDATION, **options, checkpoint=path)
    assert same(model, straight)
    assert resumed.history == whole.history
    assert (resumed.epochs, resumed.resumed_from) == (4, where[0])
    assert resumed.best_epoch == whole.best_epoch


def test_resuming_tf_keras_is_exact_without_dropout(tmp_path) -> None:
    path = tmp_path / "run.npz"
    straight, model = classifier(tf_keras), classifier(tf_keras)
    fine_tune(straight, TRAIN, **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        fine_tune(
            model, TRAIN, **OPTIONS, checkpoint=path, callbacks=[interrupting(tf_keras, 2, 1)]
        )
    fine_tune(model, TRAIN, **OPTIONS, checkpoint=path)
    assert same(model, straight)


def test_early_stopping_and_best_weights_survive_an_interruption(tmp_path) -> None:
    x, y = VALIDATION
    options = {**OPTIONS, "epochs": 20, "schedule": "constant"}
    options |= {"patience": 3, "restore_best": True}
    wrong = (x, (y + 1) % 3)
    straight, model = classifier(keras, seed=3), classifier(keras, seed=3)
    whole = fine_tune(straight, TRAIN, wrong, **options)
    # In the last epoch but one, when the best one has long gone by.
    stop = interrupting(keras, whole.epochs - 1, 0)
    path = tmp_path / "run.npz"
    with pytest.raises(KeyboardInterrupt):
        fine_tune(model, TRAIN, wrong, **options, checkpoint=path, callbacks=[stop])
    resumed = fine_tune(model, TRAIN, wrong, **options, checkpoint=path)
    assert same(model, straight)
    assert (resumed.epochs, resumed.best_epoch) == (whole.epochs, whole.best_epoch)
    assert resumed.stopped_early and resumed.restored_best


def test_a_finished_run_is_not_run_again(tmp_path) -> None:
    path = tmp_path / "run.npz"
    first, second = classifier(keras), classifier(keras, seed=4)
    done = fine_tune(first, TRAIN, **OPTIONS, checkpoint=path)
    again = fine_tune(
        second, TRAIN, **OPTIONS, checkpoint=path, callbacks=[interrupting(keras, 3, 0)]
    )
    assert same(first, second)
    assert again.history == done.history and again.seconds == done.seconds
    assert again.resumed_from == 4


def test_a_run_at_a_constant_rate_can_be_extended(tmp_path) -> None:
    path = tmp_path / "run.npz"
    options = {**OPTIONS, "schedule": "constant"}
    straight, model = classifier(keras), classifier(keras)
    fine_tune(straight, TRAIN, **options)
    fine_tune(model, TRAIN, **{**options, "epochs": 2}, checkpoint=path)
    fine_tune(model, TRAIN, **options, checkpoint=path)
    assert same(model, straight)


def test_starting_anew_writes_over(tmp_path) -> None:
    path = tmp_path / "run.npz"
    fine_tune(classifier(keras), TRAIN, **OPTIONS, checkpoint=path)
    model, straight = classifier(keras, seed=1), classifier(keras, seed=1)
    fine_tune(straight, TRAIN, **OPTIONS)
    record = fine_tune(model, TRAIN, **OPTIONS, checkpoint=path, resume=False)
    assert record.resumed_from == 0 and same(model, straight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, "seed: 5 there, 6 here"),
        ({"epochs": 5}, "learning rate"),
        ({"batch_size": 8}, "batch size: 16 there, 8 here"),
        ({"weight_decay": 0.1}, "weight decay: 0 there"),
        ({"optimizer": "adam"}, "optimizer: 'sgd' there, 'adam' here"),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(change, message, finished, tmp_path) -> None:
    path = tmp_path / "run.npz"
    path.write_bytes(finished)
    model = classifier(keras)
    before = model.get_weights()
    with pytest.raises(ArgumentError, match=f"another run.*{message}.*resume=False"):
        fine_tune(model, TRAIN, **{**OPTIONS, **change}, checkpoint=path)
    assert path.read_bytes() == finished
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_the_checkpoint_of_another_model_is_refused(finished, tmp_path) -> None:
    path = tmp_path / "run.npz"
    path.write_bytes(finished)
    other = keras.Sequential(
        [keras.Input((6, 6, 2)), keras.layers.Flatten(), keras.layers.Dense(3)]
    )
    with pytest.raises(ArgumentError, match="shapes of the weights"):
        fine_tune(other, TRAIN, **OPTIONS, checkpoint=path)


def damaged(content: bytes) -> list[bytes]:
    header = json.dumps({"format": 99, "settings": {}}).encode()
    return [b"", b"not an archive", content[: len(content) // 2], header]


# numpy's reader leaves the file of a broken archive to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*run.npz:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", range(4))
def test_a_damaged_file_is_refused(number: int, finished, tmp_path) -> None:
    path = tmp_path / "run.npz"
    path.write_bytes(damaged(finished)[number])
    with pytest.raises(ArgumentError, match="no training checkpoint that can be read"):
        fine_tune(classifier(keras), TRAIN, **OPTIONS, checkpoint=path)


def test_pickles_and_other_formats_are_refused(tmp_path) -> None:
    path = tmp_path / "run.npz"
    np.savez(path, header=np.array([{"format": 1}], dtype=object))
    with pytest.raises(ArgumentError, match="can be read"):
        checkpoint.load(path, {})
    header = json.dumps({"format": 99, "settings": {}}).encode()
    np.savez(path, header=np.frombuffer(header, np.uint8))
    with pytest.raises(ArgumentError, match="format 99"):
        checkpoint.load(path, {})


def test_a_failure_while_writing_leaves_the_former_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "deep" / "run.npz"
    state = checkpoint.TrainingState(epochs=3, weights=[np.arange(4.0)])
    checkpoint.save(path, state, {"seed": 1})
    content = path.read_bytes()

    def fail(*args, **kwargs):
        args[0].write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", fail)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, state, {"seed": 1})
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["run.npz"]
    read = checkpoint.load(path, {"seed": 1})
    assert read.epochs == 3 and np.array_equal(read.weights[0], np.arange(4.0))


def test_bfloat16_variables_go_to_disk_and_back(tmp_path) -> None:
    layer = keras.layers.Dense(3, dtype="bfloat16")
    layer.build((None, 4))
    values = checkpoint.read_variables(keras, layer.weights)
    checkpoint.save(tmp_path / "x", checkpoint.TrainingState(weights=values), {})
    before = [np.asarray(w.numpy()).copy() for w in layer.weights]
    layer.kernel.assign(layer.kernel * 0)
    checkpoint.write_variables(layer.weights, checkpoint.load(tmp_path / "x", {}).weights, "it")
    after = [np.asarray(w.numpy()) for w in layer.weights]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert after[0].dtype.name == "bfloat16"
