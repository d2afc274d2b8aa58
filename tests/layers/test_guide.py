"""The programs of tfmot's pruning guides, on Keras 3: only the import of tfmot differs.

In the words of this project, with models and data that take no time. The guides are at
https://www.tensorflow.org/model_optimization/guide/pruning.
"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfprune as tfmot
from tests.layers.networks import normal
from tfprune.layers import masks_of

layers = keras.layers
prune_low_magnitude = tfmot.sparsity.keras.prune_low_magnitude
ConstantSparsity = tfmot.sparsity.keras.ConstantSparsity
X, Y = normal(20, 20), np.eye(20, dtype="float32")


def _base_model():
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [keras.Input((20,)), layers.Dense(20, name="first"), layers.Flatten(name="flat")]
    )


def _compile(model):
    model.compile(loss=keras.losses.CategoricalCrossentropy(from_logits=True), optimizer="adam")
    return model


def _zeros(model):
    """The fraction of zeros in each kernel."""
    return [float((np.asarray(w) == 0).mean()) for w in model.get_weights() if w.ndim > 1]


def test_prune_a_whole_model(tmp_path) -> None:
    pretrained = tmp_path / "pretrained.weights.h5"
    _base_model().save_weights(pretrained)
    base = _base_model()
    base.load_weights(pretrained)  # optional, recommended for accuracy
    pruned = prune_low_magnitude(base, ConstantSparsity(0.5, 1, frequency=1))
    _compile(pruned).fit(X, Y, verbose=0, callbacks=[tfmot.sparsity.keras.UpdatePruningStep()])
    assert _zeros(tfmot.sparsity.keras.strip_pruning(pruned)) == [0.5]


def test_prune_some_layers_by_type_and_by_name() -> None:
    base = _base_model()
    by_type = lambda layer: isinstance(layer, layers.Dense)  # noqa: E731
    by_name = lambda layer: layer.name == "first"  # noqa: E731
    for wanted in (by_type, by_name):

        def apply_pruning(layer, wanted=wanted):
            return prune_low_magnitude(layer) if wanted(layer) else layer

        pruned = keras.models.clone_model(base, clone_function=apply_pruning)
        assert [layer.name for layer in pruned.layers] == ["prune_low_magnitude_first", "flat"]
        # layers, and so weights, are shared with the base model here, as in tfmot
        np.testing.assert_array_equal(np.asarray(pruned(X)), np.asarray(base(X)))
        assert pruned.layers[0].layer is base.layers[0]


def test_prune_in_the_definition_of_a_model() -> None:
    inputs = keras.Input((20,))
    x = prune_low_magnitude(layers.Dense(10))(inputs)
    functional = keras.Model(inputs, layers.Flatten()(x))
    sequential = keras.Sequential(
        [keras.Input((20,)), prune_low_magnitude(layers.Dense(10)), layers.Flatten()]
    )
    for model in (functional, sequential):
        assert len(masks_of(model)) == 1 and model(X).shape == (20, 10)


class MyDense(layers.Dense, tfmot.sparsity.keras.PrunableLayer):
    def get_prunable_weights(self):
        # the bias too, which usually costs accuracy
        return [self.kernel, self.bias]


def test_prune_a_custom_layer() -> None:
    # weights that are all equal, as biases of zeros, are all kept, as in tfmot
    mine = MyDense(20, name="mine", bias_initializer="random_normal")
    model = keras.Sequential([keras.Input((20,)), layers.Flatten(), mine])
    pruned = prune_low_magnitude(model, ConstantSparsity(0.75, 1, frequency=1))
    _compile(pruned).fit(X, Y, verbose=0, callbacks=[tfmot.sparsity.keras.UpdatePruningStep()])
    assert masks_of(pruned).sparsities == {"mine/kernel": 0.75, "mine/bias": 0.75}


def test_watch_training_in_tensorboard(tmp_path) -> None:
    pruned = _compile(prune_low_magnitude(_base_model()))
    callbacks = [
        tfmot.sparsity.keras.UpdatePruningStep(),
        tfmot.sparsity.keras.PruningSummaries(log_dir=str(tmp_path)),
    ]
    pruned.fit(X, Y, batch_size=10, epochs=2, verbose=0, callbacks=callbacks)
    assert list(tmp_path.glob("metrics/events.out.tfevents.*"))


def test_a_custom_training_loop(tmp_path) -> None:
    pruned = prune_low_magnitude(_base_model(), ConstantSparsity(0.5, 1, frequency=1))
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam()
    unused = -1
    # boilerplate
    pruned.optimizer = optimizer
    step_callback = tfmot.sparsity.keras.UpdatePruningStep()
    step_callback.set_model(pruned)
    log_callback = tfmot.sparsity.keras.PruningSummaries(log_dir=str(tmp_path))
    log_callback.set_model(pruned)
    step_callback.on_train_begin()
    for _ in range(2):
        log_callback.on_epoch_begin(epoch=unused)
        for start in (0, 10):
            step_callback.on_train_batch_begin(batch=unused)
            with tf.GradientTape() as tape:
                value = loss(Y[start : start + 10], pruned(X[start : start + 10], training=True))
            gradients = tape.gradient(value, pruned.trainable_variables)
            optimizer.apply_gradients(zip(gradients, pruned.trainable_variables, strict=True))
        step_callback.on_epoch_end(batch=unused)
    assert int(np.asarray(pruned.layers[0].pruning_step)) == 4
    assert _zeros(tfmot.sparsity.keras.strip_pruning(pruned)) == [0.5]
    assert list(tmp_path.glob("metrics/events.out.tfevents.*"))


def test_checkpoint_and_deserialize(tmp_path) -> None:
    pruned = _compile(prune_low_magnitude(_base_model(), ConstantSparsity(0.5, 1, frequency=1)))
    pruned.fit(X, Y, verbose=0, callbacks=[tfmot.sparsity.keras.UpdatePruningStep()])
    pruned.save(tmp_path / "model.keras")
    with tfmot.sparsity.keras.prune_scope():
        loaded = keras.models.load_model(tmp_path / "model.keras")
    # the optimizer came along
    loaded.fit(X, Y, verbose=0, callbacks=[tfmot.sparsity.keras.UpdatePruningStep()])
    assert int(np.asarray(loaded.layers[0].pruning_step)) == 2
    assert int(np.asarray(loaded.optimizer.iterations)) == 2


def test_structural_pruning_two_by_four() -> None:
    keras.utils.set_random_seed(0)
    pattern = {"sparsity_m_by_n": (2, 4)}
    model = keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            prune_low_magnitude(layers.Conv2D(8, 3, padding="same", name="sparse"), **pattern),
            layers.Conv2D(3, 3, name="dense"),  # not pruned
            layers.Flatten(),
            prune_low_magnitude(layers.Dense(5, name="structural"), **pattern),
        ]
    )
    model.compile("adam", "mse")
    callbacks = [tfmot.sparsity.keras.UpdatePruningStep()]
    model.fit(normal(16, 8, 8, 4), normal(16, 5), batch_size=8, verbose=0, callbacks=callbacks)
    bare = tfmot.sparsity.keras.strip_pruning(model)
    # along the input channels
    kernel = np.moveaxis(np.asarray(bare.get_layer("sparse").kernel), 2, -1)
    assert ((kernel.reshape(-1, 4) == 0).sum(axis=1) == 2).all()
    weights = np.asarray(bare.get_layer("structural").kernel).T
    fours = weights[:, : weights.shape[1] // 4 * 4].reshape(-1, 4)
    assert ((fours == 0).sum(axis=1) == 2).all()
    assert np.asarray(bare.get_layer("dense").kernel).all()


@pytest.mark.slow
def test_export_a_smaller_file(tmp_path) -> None:
    """Strip, convert, compress: both steps are needed, as the guide shows."""
    import zlib

    inputs = keras.Input((64,))
    dense = keras.Model(inputs, layers.Dense(64, name="only")(inputs))
    pruned = prune_low_magnitude(dense, ConstantSparsity(0.9, 1, frequency=1))
    pruned.compile("adam", "mse")
    callbacks = [tfmot.sparsity.keras.UpdatePruningStep()]
    pruned.fit(normal(16, 64), normal(16, 64), verbose=0, callbacks=callbacks)
    bare = tfmot.sparsity.keras.strip_pruning(pruned)
    sizes = []
    for name, model in (("dense", dense), ("bare", bare)):
        path = tmp_path / f"{name}.tflite"
        tfmot.export(model, path)
        sizes.append(len(zlib.compress(path.read_bytes())))
    assert sizes[1] < sizes[0] / 2
    interpreter = _interpreter(path.read_bytes())
    interpreter.set_tensor(0, normal(1, 64))
    interpreter.invoke()
    output = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    # one product of 64 float32 numbers, in another order
    np.testing.assert_allclose(output, np.asarray(bare(normal(1, 64))), rtol=1e-5, atol=1e-5)


def _interpreter(content):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content)
    interpreter.allocate_tensors()
    return interpreter
