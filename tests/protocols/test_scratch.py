"""Training the pruned structure from random weights, and how long."""

import random

import keras
import numpy as np
import pytest
import tf_keras

from tests.zoo.without_values import without_values
from tfprune import zoo
from tfprune.cost import liu_flops
from tfprune.errors import ArgumentError, ModelError
from tfprune.graph.trace import node_counts
from tfprune.layers import prune_low_magnitude
from tfprune.protocols import fine_tune, reinitialise, scratch_b, scratch_b_epochs, scratch_e

from .models import classifier, examples
from .test_resuming import interrupting, same

TRAIN = examples(60, seed=0)
BOTH = pytest.mark.parametrize("framework", [keras, tf_keras], ids=["keras", "tf_keras"])

# FLOPs by liu_flops of tfprune.zoo's networks, at 32x32 and 224x224.
VGG16, R56, R110 = 627_883_018, 252_574_986, 508_927_242
R34, R50, PRE50, VGG_IMAGENET = 7_340_368_872, 8_212_012_520, 8_209_604_072, 30_973_762_536
PUBLISHED = [
    # name, epochs of the dense network, its FLOPs, the pruned one's, limit, epochs of Scratch-B
    ("vgg16-a", 160, VGG16, 413_365_258, None, 243),
    ("resnet56-a", 160, R56, 226_392_138, None, 178),
    ("resnet56-b", 160, R56, 183_139_914, None, 220),
    ("resnet110-a", 160, R110, 428_293_386, None, 190),
    ("resnet110-b", 160, R110, 312_747_786, None, 260),
    ("resnet34-a", 90, R34, 6_212_474_328, 2, 106),
    ("resnet34-b", 90, R34, 5_576_178_360, 2, 118),
    ("thinet-70", 90, R50, 5_233_407_870, 2, 141),
    ("thinet-50", 90, R50, 3_672_777_960, 2, 180),
    ("thinet-30", 90, R50, 2_359_280_481, 2, 180),
    ("sss-41", 100, PRE50, 6_968_049_128, 2, 117),
    ("sss-32", 100, PRE50, 5_658_756_584, 2, 145),
    ("sss-26", 100, PRE50, 4_573_901_288, 2, 179),
    # The authors' page says 132, their code's rule 133 or 134, by where ResNet-50 has its strides.
    ("channel-pruning-2x", 90, R50, 5_492_176_674, 2, 134),
    ("channel-pruning-2x, 1x1", 90, 7_748_009_960, 5_228_978_466, 2, 133),
    ("vgg-conv", 90, VGG_IMAGENET, 9_599_388_648, 2, 180),
    ("vgg-gap", 90, VGG_IMAGENET, 9_353_028_584, 2, 180),
    ("vgg-tiny", 90, VGG_IMAGENET, 2_017_487_848, 2, 180),
    ("channel-pruning-5x", 90, VGG_IMAGENET, 7_043_492_200, 2, 180),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_the_papers_epochs(row) -> None:
    _, epochs, dense, pruned, limit, expected = row
    assert scratch_b_epochs(epochs, dense, pruned, max_ratio=limit) == expected


def test_the_counter_on_the_papers_networks() -> None:
    """Two of the figures above, from the networks; the others were counted the same way."""
    inner = zoo.RESNET_INNER["resnet56-a"]
    with without_values(lambda: zoo.resnet_cifar(56, inner_widths=inner)) as network:
        assert liu_flops(network) == 226_392_138
    with without_values(lambda: zoo.vgg_cifar(16, hidden=512)) as network:
        assert liu_flops(network) == VGG16


def test_epochs_round_down_in_whole_numbers() -> None:
    assert scratch_b_epochs(160, 100, 100) == 160
    assert [scratch_b_epochs(e, 11, 10) for e in (10, 19, 100)] == [11, 20, 110]
    # In floats int(100 * (116 / 100)) is 115, and the ratio of the second is 2.
    assert scratch_b_epochs(100, 116, 100) == 116 > int(100 * (116 / 100))
    assert scratch_b_epochs(3, 10**17 - 1, 10**17 // 2) == 5
    assert scratch_b_epochs(90, 300, 100, max_ratio=2) == 180
    assert scratch_b_epochs(90, 199, 100, max_ratio=2) == 179


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2, 1, None), "epochs of at least 1; received 0"),
        ((10, 100, 101, None), r"received 101 and 100 \(dense\).*swapped"),
        ((10, 100, 0, None), "and of some"),
        ((10, 100, 50, 0.5), "max_ratio of at least 1.*0.5"),
        ((10, 100, 50, float("nan")), "max_ratio of at least 1"),
    ],
)
def test_impossible_budgets_are_refused(arguments, message: str) -> None:
    *numbers, limit = arguments
    with pytest.raises(ArgumentError, match=message):
        scratch_b_epochs(*numbers, max_ratio=limit)


@BOTH
def test_the_counter_by_hand(framework) -> None:
    layers = framework.layers
    x = image = framework.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(x)
    total = (2 * 9 * 3 + 1) * 4 * 64 + 4 * 64
    x = layers.Conv2D(6, 3, strides=2, groups=2, use_bias=False)(x)
    total += 2 * 9 * 2 * 6 * 9
    x = layers.BatchNormalization()(x)
    total += 2 * 6 * 9
    x = again = layers.ReLU()(x)
    total += 6 * 9
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    total += (2 * 9 + 1) * 6 * 9
    x = layers.Add()([x, again])
    # A layer that is called twice counts twice.
    shared = layers.Conv2D(6, 1)
    x = shared(shared(x))
    total += 2 * (2 * 6 + 1) * 6 * 9
    x = layers.MaxPooling2D(2)(layers.AveragePooling2D((1, 2), padding="same")(x))
    total += 2 * 3 * 2 * 6 + 4 * 1 * 1 * 6
    inner = framework.Input((1, 1, 6))
    x = framework.Model(inner, layers.Activation("relu")(inner))(x)
    total += 6
    # Of vectors, and global: not counted.
    x = layers.BatchNormalization()(layers.GlobalAveragePooling2D()(x))
    x = layers.Dense(10, activation="softmax")(x)
    total += 2 * 6 * 10 + 10
    assert liu_flops(framework.Model(image, layers.Dropout(0.5)(x))) == total


def test_the_counter_needs_sizes() -> None:
    x = image = keras.Input((None, None, 3))
    model = keras.Model(image, keras.layers.Conv2D(2, 1)(x))
    with pytest.raises(ModelError, match="MACs are a number"):
        liu_flops(model)
    assert liu_flops(model, input_shape=(5, 4, 3)) == (2 * 3 + 1) * 2 * 20


@BOTH
def test_weights_are_drawn_anew(framework) -> None:
    """By the layers' own initialisers, though these carry seeds; and reproducibly."""
    model = classifier(framework)
    model.layers[2].set_weights([np.full(4, v, np.float32) for v in (2, 3, 4, 5)])
    before, nodes = model.get_weights(), node_counts(model)
    state = random.getstate()
    first, twin, other = (reinitialise(model, seed=seed) for seed in (1, 1, 2))
    assert random.getstate() == state
    assert same(first, twin)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert nodes == node_counts(model) and type(first) is type(model)
    names = [[layer.name for layer in m.layers] for m in (model, first)]
    assert names[0] == names[1]
    for new, old, third in zip(first.get_weights(), before, other.get_weights(), strict=True):
        assert new.shape == old.shape
        # Kernels are random; biases, scales and statistics have a fixed start.
        assert (new.ndim > 1) == (not np.array_equal(new, third))
        assert new.ndim == 1 or not np.array_equal(new, old)
    for number, value in enumerate((1, 0, 0, 1)):  # gamma, beta, mean, variance
        assert np.all(first.layers[2].get_weights()[number] == value)


@BOTH
def test_the_distribution_is_the_initialisers(framework) -> None:
    initial = framework.initializers.RandomNormal(mean=3.0, stddev=0.1, seed=7)
    zeros = framework.initializers.Constant(0.25)
    model = framework.Sequential(
        [
            framework.layers.Input((100,)),
            framework.layers.Dense(100, kernel_initializer=initial, bias_initializer=zeros),
        ]
    )
    model.set_weights([w * 0 for w in model.get_weights()])
    kernel, bias = reinitialise(model, seed=3).get_weights()
    # 10,000 draws: standard errors of 0.001 and 0.0007; five of them.
    assert kernel.mean() == pytest.approx(3.0, abs=0.005)
    assert kernel.std() == pytest.approx(0.1, abs=0.0035)
    assert np.all(bias == 0.25)


@BOTH
def test_weights_that_share_a_seeded_initialiser_differ(framework) -> None:
    x = framework.Input((4, 8))
    initial = framework.initializers.GlorotUniform(seed=1)
    y = framework.layers.MultiHeadAttention(2, 8, kernel_initializer=initial)(x, x)
    dense = framework.layers.Dense(8, kernel_initializer=initial)
    model = framework.Model(x, framework.layers.TimeDistributed(dense)(y))
    fresh = reinitialise(model, seed=0)
    query, _, key, _, value, *_ = fresh.layers[1].get_weights()
    assert query.shape == key.shape
    assert not np.array_equal(query, key) and not np.array_equal(key, value)
    assert same(fresh, reinitialise(model, seed=0))
    inner = [m.layers[-1].get_weights()[0] for m in (model, fresh)]
    assert not np.array_equal(*inner)


def test_tf_kerases_own_generator_of_seeds_is_used_and_put_back() -> None:
    from tf_keras.src import backend

    model = classifier(tf_keras)
    expected = reinitialise(model, seed=1)
    backend._SEED_GENERATOR.generator = own = random.Random(5)
    try:
        state = own.getstate()
        assert same(reinitialise(model, seed=1), expected)
        assert own.getstate() == state
    finally:
        del backend._SEED_GENERATOR.generator


@keras.saving.register_keras_serializable("test_scratch")
class Ramp(keras.initializers.Initializer):
    """A user's initialiser, which needs its seed."""

    def __init__(self, seed):
        self.seed = seed

    def __call__(self, shape, dtype=None):
        values = np.random.default_rng([self.seed, 9]).normal(size=shape)
        return keras.ops.convert_to_tensor(values, dtype)

    def get_config(self):
        return {"seed": self.seed}


def test_a_users_initialiser_gets_another_seed() -> None:
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, kernel_initializer=Ramp(seed=4))]
    )
    first, twin, other = (reinitialise(model, seed=seed) for seed in (0, 0, 1))
    assert same(first, twin) and not same(first, other) and not same(first, model)


@BOTH
def test_what_describes_the_data_stays(framework) -> None:
    normal = framework.layers.Normalization()
    normal.adapt(np.random.default_rng(0).normal(3, 2, (50, 4)).astype(np.float32))
    model = framework.Sequential([framework.layers.Input((4,)), normal, framework.layers.Dense(2)])
    model.layers[1].trainable = False
    fresh = reinitialise(model, seed=1)
    x = np.ones((1, 4), np.float32)
    assert np.array_equal(fresh.layers[0](x), normal(x)) and not np.allclose(normal(x), x)
    assert not fresh.layers[1].trainable and not same(fresh, model)


def test_models_that_cannot_be_drawn_anew_are_refused() -> None:
    with pytest.raises(ModelError, match="strip_pruning"):
        reinitialise(prune_low_magnitude(classifier(keras)))
    with pytest.raises(ArgumentError, match="seed from 0"):
        reinitialise(classifier(keras), seed=-1)

    class Subclassed(keras.Model):
        pass

    with pytest.raises(ModelError, match="subclassed"):
        reinitialise(Subclassed())


def narrow(framework, filters: int = 2):
    """A pruned form of a network of four filters; its weights are of no interest."""
    return framework.Sequential(
        [
            framework.layers.Input((6, 6, 2)),
            framework.layers.Conv2D(filters, 3, use_bias=False),
            framework.layers.Flatten(),
            framework.layers.Dense(
                3, kernel_initializer=framework.initializers.GlorotUniform(seed=1)
            ),
        ]
    )


OPTIONS = {"verbose": 0, "batch_size": 30, "learning_rate": 0.02, "seed": 5}


@BOTH
def test_scratch_b_spends_the_dense_networks_budget(framework) -> None:
    model, dense = narrow(framework), narrow(framework, filters=4)
    before = model.get_weights()
    decay = {} if framework is keras else {"decay": "decoupled"}
    result = scratch_b(model, TRAIN, dense=dense, epochs=4, **OPTIONS, **decay)
    flops = [2 * 9 * 2 * c * 16 + 2 * 16 * c * 3 + 3 for c in (2, 4)]
    assert result.flops_ratio == flops[1] / flops[0] and 1.9 < result.flops_ratio < 2
    assert result.epochs == result.record.epochs == 7
    # "step" over 7 epochs: 4 / 7 is the first past the half, 6 / 7 the first past three quarters.
    rates = 0.02 * np.array([1, 1, 1, 1, 0.1, 0.1, 0.01])
    np.testing.assert_allclose(result.record.history["learning_rate"], rates, rtol=1e-12)
    assert result.record.seed == 5
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert result.model is not model and type(result.model) is type(model)


def test_scratch_e_trains_as_long_and_goes_on_after_an_interruption(tmp_path) -> None:
    model = narrow(keras)
    path, stop = tmp_path / "run.npz", interrupting(keras, 2, 1)
    options = {"epochs": 4, **OPTIONS}
    straight = scratch_e(model, TRAIN, **options)
    assert (straight.epochs, straight.record.epochs, straight.flops_ratio) == (4, 4, 1.0)
    fresh = reinitialise(model, seed=5)
    fine_tune(fresh, TRAIN, **options, schedule="step", weight_decay=1e-4)
    assert same(fresh, straight.model)
    # The weights of the model that is given do not matter.
    model.set_weights([w + 1 for w in model.get_weights()])
    with pytest.raises(KeyboardInterrupt):
        scratch_e(model, TRAIN, **options, checkpoint=path, callbacks=[stop])
    resumed = scratch_e(model, TRAIN, **options, checkpoint=path)
    assert resumed.record.resumed_from == 2
    assert same(resumed.model, straight.model)
    assert resumed.record.history == straight.record.history


def test_bad_requests_are_refused() -> None:
    model, dense = narrow(keras), narrow(keras, filters=4)
    with pytest.raises(ArgumentError, match="swapped"):
        scratch_b(dense, TRAIN, dense=model, epochs=4)
    with pytest.raises(ModelError, match="received str"):
        scratch_e("resnet", TRAIN, epochs=4)
    with pytest.raises(TypeError, match="epoch_count"):
        scratch_e(model, TRAIN, epochs=1, epoch_count=4)
    with pytest.raises(ArgumentError, match="decoupled"):
        scratch_e(narrow(tf_keras), TRAIN, epochs=1)
