"""Each name of tfmot's sparsity API, with tfmot on tf_keras as the oracle."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tfprune
from tests.layers.twins import batches, compiled, convolutional, dense, pair, state, tfmot, wrappers

# Keras 3 and tf_keras compute the same gradients with other operations in another order. Batch
# normalisation over 8 examples makes more of that: 2e-5 was seen in weights of size 0.5 after 12
# steps.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def _prepared(build, **options):
    """Wrapped and compiled twins, their callbacks started."""
    three, two = pair(build)
    ours = compiled(tfprune.prune_low_magnitude(three, **options), keras)
    theirs = compiled(tfmot.prune_low_magnitude(two, **options), tf_keras)
    callbacks = tfprune.UpdatePruningStep(), tfmot.UpdatePruningStep()
    for callback, model in zip(callbacks, (ours, theirs), strict=True):
        callback.set_model(model)
        callback.on_train_begin()
    return (ours, theirs), callbacks


def _require_same(ours, theirs):
    assert len(wrappers(ours)) == len(wrappers(theirs)) > 0
    for mine, other in zip(state(ours), state(theirs), strict=True):
        assert mine[0] == other[0]
        for a, b in zip(mine[1], other[1], strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_allclose(mine[2], other[2], **CLOSE)
        for a, b in zip(mine[3], other[3], strict=True):
            np.testing.assert_allclose(a, b, **CLOSE)


def test_the_api_has_every_name_of_tfmot() -> None:
    theirs = {name for name in dir(tfmot) if not name.startswith("_")}
    assert theirs == set(tfprune.sparsity.keras.__all__)
    for name in theirs - {"ConstantSparsity", "PolynomialDecay", "PruningSchedule"}:
        assert getattr(tfprune, name) is getattr(tfprune.sparsity.keras, name)


@pytest.mark.parametrize(
    ("build", "options"),
    [
        (convolutional, {"pruning_schedule": tfmot.ConstantSparsity(0.6, 2, frequency=3)}),
        (
            convolutional,
            {"pruning_schedule": tfmot.PolynomialDecay(0.1, 0.8, 1, 9, frequency=2)},
        ),
        (convolutional, {"pruning_schedule": tfmot.ConstantSparsity(0.5, 3, 6, frequency=1)}),
        (convolutional, {}),
        (convolutional, {"sparsity_m_by_n": (2, 4)}),
        (convolutional, {"sparsity_m_by_n": (1, 2)}),
        (
            dense,
            {
                "pruning_schedule": tfmot.ConstantSparsity(0.5, 0, frequency=2),
                "block_size": (2, 3),
            },
        ),
        (
            dense,
            {
                "pruning_schedule": tfmot.PolynomialDecay(0.0, 0.75, 0, 8, frequency=4),
                "block_size": (4, 1),
                "block_pooling_type": "MAX",
            },
        ),
    ],
    ids=["constant", "polynomial", "ends", "default", "2:4", "1:2", "blocks", "max-blocks"],
)
def test_prune_low_magnitude_at_every_step(build, options) -> None:
    models, callbacks = _prepared(build, **options)
    _require_same(*models)
    for number, (x, y) in enumerate(batches(models[0], 12)):
        for model in models:
            model.train_on_batch(x, y)
        _require_same(*models)
        if number % 4 == 3:
            for callback in callbacks:
                callback.on_epoch_end(number)
            _require_same(*models)
    # Masked after the last step by the callback, so tfmot's stripped model is sparse as well.
    stripped = tfprune.strip_pruning(models[0]), tfmot.strip_pruning(models[1])
    for mine, other in zip(stripped[0].layers, stripped[1].layers, strict=True):
        assert mine.name == other.name
        for a, b in zip(mine.trainable_weights, other.trainable_weights, strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), **CLOSE)
    x = batches(models[0], 1, seed=2)[0][0]
    np.testing.assert_array_equal(np.asarray(stripped[0](x)), np.asarray(models[0](x)))
    if options:  # the default's frequency of 100 leaves the masks alone
        assert all((a != 1).any() for _, masks, _, _ in state(models[0]) for a in masks)


def test_the_default_schedule_is_tfmots() -> None:
    ours = tfprune.prune_low_magnitude(keras.layers.Dense(3)).pruning_schedule
    theirs = tfmot.prune_low_magnitude(tf_keras.layers.Dense(3)).pruning_schedule
    assert ours.get_config() == theirs.get_config()


def test_update_pruning_step_in_fit() -> None:
    schedule = tfmot.PolynomialDecay(0.0, 0.8, 0, 10, frequency=2)
    three, two = pair(convolutional)
    ours = compiled(tfprune.prune_low_magnitude(three, schedule), keras)
    theirs = compiled(tfmot.prune_low_magnitude(two, schedule), tf_keras)
    data = [np.concatenate(parts) for parts in zip(*batches(three, 4), strict=True)]
    options = {"batch_size": 8, "epochs": 3, "shuffle": False, "verbose": 0}
    mine = ours.fit(*data, callbacks=[tfprune.UpdatePruningStep()], **options)
    other = theirs.fit(*data, callbacks=[tfmot.UpdatePruningStep()], **options)
    _require_same(ours, theirs)
    np.testing.assert_allclose(mine.history["loss"], other.history["loss"], **CLOSE)
    for _, masks, _, weights in state(ours):
        for mask, weight in zip(masks, weights, strict=True):
            assert not weight[mask == 0].any()  # masked after the last step


@pytest.mark.parametrize("wrap", [tfprune.prune_low_magnitude, tfmot.prune_low_magnitude])
def test_without_the_callback_training_stops_at_once(wrap) -> None:
    ours = wrap is tfprune.prune_low_magnitude
    framework, model = (keras, pair(dense)[0]) if ours else (tf_keras, pair(dense)[1])
    model = compiled(wrap(model), framework)
    x, y = batches(model, 1)[0]
    # tfmot raises from inside the graph
    with pytest.raises(ValueError if ours else tf.errors.InvalidArgumentError,
                       match="UpdatePruningStep"):  # fmt: skip
        model.fit(x, y, verbose=0)


def _scalars(folder):
    """Tag -> values over time, from TensorBoard's event files."""
    found = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            for value in tf.compat.v1.Event.FromString(record).summary.value:
                found.setdefault(value.tag, []).append(float(tf.make_ndarray(value.tensor)))
    return found


def test_pruning_summaries(tmp_path) -> None:
    schedule = tfmot.ConstantSparsity(0.5, 0, frequency=1)
    three, two = pair(dense)
    models = (
        (compiled(tfprune.prune_low_magnitude(three, schedule), keras), tfprune),
        (compiled(tfmot.prune_low_magnitude(two, schedule), tf_keras), tfmot),
        # tfprune's callbacks take a tf_keras model too
        (compiled(tfmot.prune_low_magnitude(pair(dense)[1], schedule), tf_keras), tfprune),
    )
    found = []
    for number, (model, api) in enumerate(models):
        x, y = batches(model, 1)[0]
        folder = tmp_path / str(number)
        callbacks = [api.UpdatePruningStep(), api.PruningSummaries(log_dir=str(folder))]
        model.fit(x, y, epochs=2, verbose=0, callbacks=callbacks)
        found.append(_scalars(folder / "metrics"))
    ours = found[0]
    assert ours["hidden/mask/sparsity"] == [0.0, 0.5]
    for theirs in found[1:]:
        assert len(theirs) == len(ours) == 4  # mask and threshold of two layers
        for layer in ("hidden", "head"):
            for kind in ("mask", "threshold"):
                (tag,) = [tag for tag in theirs if layer in tag and kind in tag]
                (mine,) = [tag for tag in ours if layer in tag and kind in tag]
                np.testing.assert_allclose(ours[mine], theirs[tag], **CLOSE)


def test_prune_scope_loads_files_of_both(tmp_path) -> None:
    for number, model in enumerate(pair(dense)):
        wrapped = tfprune.prune_low_magnitude(model)
        path = tmp_path / f"{number}.keras"
        wrapped.save(path)
        with tfprune.prune_scope():
            loaded = (keras if number == 0 else tf_keras).models.load_model(path)
        x = batches(model, 1)[0][0]
        np.testing.assert_array_equal(np.asarray(loaded(x)), np.asarray(wrapped(x)))
        assert wrappers(loaded)


class _Doubled(keras.layers.Layer, tfmot.PrunableLayer):
    """A custom layer of tfmot's guide, on Keras 3."""

    def build(self, shape):
        self.table = self.add_weight(shape=(shape[-1], 4), name="table")

    def call(self, x):
        return 2 * keras.ops.matmul(x, self.table)

    def get_prunable_weights(self):
        return [self.table]


def test_prunable_layer() -> None:
    assert tfprune.PrunableLayer is tfmot.PrunableLayer
    inputs = keras.Input((10,))
    model = keras.Model(inputs, _Doubled(name="doubled")(inputs))
    wrapped = compiled(
        tfprune.prune_low_magnitude(model, tfmot.ConstantSparsity(0.75, 0, frequency=1)), keras
    )
    x, y = batches(model, 1)[0]
    wrapped.fit(x, y, verbose=0, callbacks=[tfprune.UpdatePruningStep()])
    table = np.asarray(tfprune.strip_pruning(wrapped).get_layer("doubled").table)
    assert np.count_nonzero(table) == 10


def test_a_policy_of_your_own() -> None:
    class OnlyHead(tfprune.PruningPolicy):
        checked = 0

        def allow_pruning(self, layer):
            return layer.name == "head"

        def ensure_model_supports_pruning(self, model):
            type(self).checked += 1

    assert issubclass(tfprune.PruningPolicy, tfmot.PruningPolicy)
    for model in pair(dense):
        wrapped = tfprune.prune_low_magnitude(model, pruning_policy=OnlyHead())
        assert [layer.layer.name for layer in wrappers_of_any(wrapped)] == ["head"]
    assert OnlyHead.checked == 2


def wrappers_of_any(model):
    """Wrappers of either Keras."""
    return [layer for layer in model.layers if hasattr(layer, "pruning_vars")]


def test_a_model_of_keras2_goes_to_tfmot() -> None:
    two = pair(dense)[1]
    schedule = tfprune.schedules.Linear(0.0, 0.5, 0, 4, frequency=1)
    wrapped = compiled(tfprune.prune_low_magnitude(two, pruning_schedule=schedule), tf_keras)
    oracle = compiled(tfmot.prune_low_magnitude(pair(dense)[1], schedule), tf_keras)
    assert type(wrapped.layers[-1]) is type(oracle.layers[-1])
    data = [np.concatenate(parts) for parts in zip(*batches(two, 4), strict=True)]
    options = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}
    # tfprune's callback does with it what tfmot's does
    wrapped.fit(*data, callbacks=[tfprune.UpdatePruningStep()], **options)
    oracle.fit(*data, callbacks=[tfmot.UpdatePruningStep()], **options)
    _require_same(wrapped, oracle)
    assert state(wrapped)[0][0] == 8
    bare = tfprune.strip_pruning(wrapped)
    assert [type(layer).__name__ for layer in bare.layers] == ["Dense", "Dense"]
    assert (np.asarray(bare.layers[0].kernel) == 0).mean() == 0.5


def test_a_layer_of_keras2_goes_to_tfmot() -> None:
    layer = tfprune.prune_low_magnitude(tf_keras.layers.Dense(3))
    assert type(layer).__module__.startswith("tensorflow_model_optimization.")
    both = tfprune.prune_low_magnitude([tf_keras.layers.Dense(3), tf_keras.layers.ReLU()])
    assert [type(one) for one in both] == [type(layer)] * 2
