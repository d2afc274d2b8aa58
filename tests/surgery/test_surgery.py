"""Rebuilding: what is kept of a model besides its function, and the oracle itself."""

import keras
import numpy as np
import pytest

import tfprune
from tests import toys
from tfprune.graph.plan import PruningPlan
from tfprune.testing import check_surgery, random_plan


@pytest.mark.parametrize("build", [toys.chain, toys.residual])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.9])
def test_masked_equals_pruned(build, ratio):
    # A few float32 layers: 1e-5 of the largest output is some hundred roundings.
    plan = check_surgery(build(), ratio=ratio, tolerance=1e-5)
    assert plan.kept


def test_weights_are_slices():
    model = toys.chain()
    plan = PruningPlan.of(tfprune.analyse(model), {"conv0": [1, 4, 5], "conv1": [0, 11]})
    small = plan.apply(model)
    kernel, bias = model.get_layer("conv1").get_weights()
    np.testing.assert_array_equal(
        small.get_layer("conv1").get_weights()[0], kernel[:, :, [1, 4, 5]][..., [0, 11]]
    )
    np.testing.assert_array_equal(small.get_layer("conv1").get_weights()[1], bias[[0, 11]])
    for old, new in zip(
        model.get_layer("norm1").get_weights(), small.get_layer("norm1").get_weights(), strict=True
    ):
        np.testing.assert_array_equal(new, old[[0, 11]])


def test_keeping_everything_changes_nothing():
    model = toys.residual()
    small = PruningPlan.of(tfprune.analyse(model), {}).apply(model)
    x = toys.images()
    np.testing.assert_array_equal(small(x), model(x))


def test_one_channel_can_be_left():
    model = toys.chain()
    plan = PruningPlan.of(tfprune.analyse(model), {f"conv{i}": [i] for i in range(3)})
    assert [plan.apply(model).get_layer(f"conv{i}").filters for i in range(3)] == [1, 1, 1]
    assert tfprune.verify(model, plan, tolerance=1e-5)  # see above


def test_what_is_kept():
    regularizer = keras.regularizers.L2(1e-3)
    initializer = keras.initializers.HeNormal(seed=3)
    inputs = keras.Input((8, 8, 3), name="picture")
    x = keras.layers.Conv2D(
        8,
        3,
        kernel_regularizer=regularizer,
        kernel_initializer=initializer,
        kernel_constraint=keras.constraints.MaxNorm(2.0),
        name="a",
    )(inputs)
    x = keras.layers.Conv2D(8, 3, dtype="mixed_bfloat16", name="b")(x)
    x = keras.layers.Dropout(0.3, seed=7, name="drop")(x)
    outputs = keras.layers.Dense(2, name="c")(keras.layers.GlobalMaxPooling2D(name="p")(x))
    model = keras.Model({"picture": inputs}, {"logits": outputs}, name="mine")
    model.get_layer("a").trainable = False
    small = tfprune.prune(model, 0.5, round_to=1)
    assert small.name == "mine"
    assert [layer.name for layer in small.layers] == [layer.name for layer in model.layers]
    assert small.get_layer("a").kernel_regularizer.get_config() == regularizer.get_config()
    assert small.get_layer("a").kernel_initializer.get_config() == initializer.get_config()
    assert isinstance(small.get_layer("a").kernel_constraint, keras.constraints.MaxNorm)
    assert small.get_layer("b").dtype_policy.name == "mixed_bfloat16"
    assert not small.get_layer("a").trainable
    assert small.get_layer("b").trainable
    assert len(small.trainable_variables) == len(model.trainable_variables)
    assert small.get_layer("drop").rate == 0.3
    assert set(small({"picture": toys.images()})) == {"logits"}


def test_sequential_stays_sequential():
    model = keras.Sequential(
        [keras.Input((6, 6, 3)), keras.layers.Conv2D(8, 3), keras.layers.Flatten(),
         keras.layers.Dense(3)], name="line",
    )  # fmt: skip
    small = tfprune.prune(model, 0.5, round_to=1)
    assert isinstance(small, keras.Sequential)
    assert small.layers[0].filters == 4
    check_surgery(model, tolerance=1e-5)  # see above


def test_compiled_models_stay_compiled():
    model = toys.chain()
    model.compile(optimizer=keras.optimizers.SGD(0.05, momentum=0.9), metrics=["accuracy"],
                  loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))  # fmt: skip
    small = tfprune.prune(model, 0.5, round_to=1)
    history = small.fit(toys.images(), toys.labels(), epochs=1, verbose=0)
    assert "accuracy" in history.history
    assert float(small.optimizer.learning_rate.numpy()) == pytest.approx(0.05)
    assert not tfprune.prune(toys.chain(), 0.5, round_to=1).compiled


def test_saved_models_load_without_tfprune(tmp_path):
    model = toys.residual()
    small = tfprune.prune(model, 0.5, round_to=1)
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    x = toys.images()
    np.testing.assert_array_equal(loaded(x), small(x))


def test_pruning_twice():
    model = toys.residual()
    once = tfprune.prune(model, 0.5, round_to=1)
    check_surgery(once, tolerance=1e-5)  # see above


def test_a_plan_fits_a_model_of_the_same_architecture():
    plan = random_plan(toys.chain(seed=0))
    assert tfprune.verify(toys.chain(seed=5), plan, tolerance=1e-5)  # see above


def test_the_oracle_can_fail():
    model = toys.chain()
    plan = random_plan(model)
    small = plan.apply(model)
    kernel = small.get_layer("conv1").kernel
    kernel.assign(kernel + 0.1)
    found = tfprune.verify(model, plan, pruned=small)
    assert not found
    assert "DIFFER" in str(found)
    kernel.assign(np.full(kernel.shape, np.nan))
    assert not tfprune.verify(model, plan, pruned=small)


def test_inexact_groups_are_named():
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(8, 1, name="conv")(inputs)
    x = keras.layers.LayerNormalization(name="norm")(x)
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)))
    graph = tfprune.analyse(model)
    assert not graph["conv"].exact
    assert "layer normalisation (norm)" in graph["conv"].inexact_reason
    found = tfprune.verify(model, random_plan(model))
    assert found
    assert found.inexact == ("conv",)
    assert "inexact" in str(graph)


def test_weights_that_are_not_finite():
    model = toys.chain()
    kernel = model.get_layer("conv1").kernel
    kernel.assign(np.full(kernel.shape, np.nan))
    with pytest.raises(tfprune.TfpruneError, match=r"conv1/kernel.*NaN"):
        tfprune.prune(model, 0.5)


def test_a_loss_that_cannot_be_made_again():
    model = toys.chain()

    def my_loss(y_true, y_pred):
        return keras.ops.mean(y_pred)

    model.compile(loss=my_loss)
    with pytest.warns(UserWarning, match="not compiled"):
        small = tfprune.prune(model, 0.5, round_to=1)
    assert not small.compiled
