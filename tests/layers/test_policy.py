"""Which layers to prune for XNNPACK: tfmot's own policy is the oracle where the rules agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.sparse_path.networks import WIDTH, block, network, stem
from tfprune.errors import ModelError
from tfprune.layers.policy import PruneForLatencyOnXNNPack
from tfprune.schedules.tfmot import load

Options = dict[str, Callable[..., Any]]
KERAS_PAD = ((0, 1), (0, 1))

AGREED_GOOD: dict[str, Options] = {
    "plain": {},
    "stride": {"middle": lambda k, x: block(k, x, 1)},
    "5x5": {"middle": lambda k, x: block(k, x, 2, 5)},
    "residual": {"middle": lambda k, x: k.layers.Add()([x, block(k, x)])},
    "product": {"middle": lambda k, x: k.layers.Multiply()([x, block(k, x)])},
    "leaky": {"middle": lambda k, x: k.layers.LeakyReLU()(x)},
    "elu": {"middle": lambda k, x: k.layers.ELU()(x)},
    "sigmoid": {"middle": lambda k, x: k.layers.Activation("sigmoid")(x)},
    "dropout": {"middle": lambda k, x: k.layers.Dropout(0.1)(x)},
    "bilinear": {"middle": lambda k, x: k.layers.UpSampling2D(interpolation="bilinear")(x)},
    "two blocks": {"middle": lambda k, x: block(k, block(k, x))},
}
AGREED_BAD: dict[str, Options] = {
    "stem of Keras": {"begin": lambda k, x, width: stem(k, x, width, KERAS_PAD)},
    "stem same": {
        "begin": lambda k, x, width: k.layers.Conv2D(width, 3, strides=2, padding="same")(x)
    },
    "stride of Keras": {"middle": lambda k, x: block(k, x, KERAS_PAD)},
    "7x7": {"middle": lambda k, x: block(k, x, 3, 7)},
    "3x3": {"middle": lambda k, x: k.layers.Conv2D(WIDTH, 3, padding="same")(x)},
    "strided 1x1": {"middle": lambda k, x: k.layers.Conv2D(WIDTH, 1, strides=2)(x)},
    "max pooling": {"middle": lambda k, x: k.layers.MaxPooling2D()(x)},
    "concatenation": {"middle": lambda k, x: k.layers.Concatenate()([x, block(k, x)])},
    "nearest": {"middle": lambda k, x: k.layers.UpSampling2D()(x)},
    "dilation": {
        "middle": lambda k, x: k.layers.DepthwiseConv2D(3, padding="same", dilation_rate=2)(x)
    },
    "multiplier": {
        "middle": lambda k, x: k.layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(x)
    },
    "softplus": {"middle": lambda k, x: k.layers.Activation("softplus")(x)},
    "flatten": {"end": lambda k, x: k.layers.Dense(3)(k.layers.Flatten()(x))},
    "max at the end": {"end": lambda k, x: k.layers.GlobalMaxPooling2D()(x)},
}
# what each has or refuses beyond the other, for the reasons in the class's documentation
WIDER: dict[str, Options] = {
    "swish": {"middle": lambda k, x: k.layers.Activation("swish")(x)},
    "tanh": {"middle": lambda k, x: k.layers.Activation("tanh")(x)},
}
NARROWER: dict[str, Options] = {
    "convolution behind the pool": {
        "end": lambda k, x: k.layers.Conv2D(3, 1)(k.layers.GlobalAveragePooling2D(keepdims=True)(x))
    },
    "lone normalisation": {"middle": lambda k, x: k.layers.BatchNormalization()(x + block(k, x))},
}


def accepts(keras: Any, options: Options, policy: Any) -> bool:
    try:
        policy.ensure_model_supports_pruning(network(keras, zeros=0.0, **options))
    except ValueError:
        return False
    return True


def verdicts(options: Options) -> tuple[bool, bool, bool]:
    """Of tfprune on Keras 3, tfprune on tf_keras, and tfmot on tf_keras."""
    import keras

    tf_keras = pytest.importorskip("tf_keras")
    tfmot = load().sparsity.keras.PruneForLatencyOnXNNPack()
    return (
        accepts(keras, options, PruneForLatencyOnXNNPack()),
        accepts(tf_keras, options, PruneForLatencyOnXNNPack()),
        accepts(tf_keras, options, tfmot),
    )


@pytest.mark.parametrize("name", AGREED_GOOD)
def test_both_accept(name: str) -> None:
    assert verdicts(AGREED_GOOD[name]) == (True, True, True)


@pytest.mark.parametrize("name", AGREED_BAD)
def test_both_refuse(name: str) -> None:
    assert verdicts(AGREED_BAD[name]) == (False, False, False)


@pytest.mark.parametrize("name", WIDER)
def test_wider_than_tfmot(name: str) -> None:
    assert verdicts(WIDER[name]) == (True, False, False)


@pytest.mark.parametrize("name", NARROWER)
def test_narrower_than_tfmot(name: str) -> None:
    assert verdicts(NARROWER[name]) == (False, True, True)


def test_layers_before_a_model_is_known() -> None:
    import keras

    tf_keras = pytest.importorskip("tf_keras")
    policy, tfmot = PruneForLatencyOnXNNPack(), load().sparsity.keras.PruneForLatencyOnXNNPack()
    makers = {
        "Conv2D 1x1": lambda k: k.layers.Conv2D(4, 1),
        "Conv2D 3x3": lambda k: k.layers.Conv2D(4, 3),
        "DepthwiseConv2D": lambda k: k.layers.DepthwiseConv2D(1),
        "Dense": lambda k: k.layers.Dense(4),
    }
    for name, make in makers.items():
        allowed = policy.allow_pruning(make(keras))
        assert (
            allowed == policy.allow_pruning(make(tf_keras)) == tfmot.allow_pruning(make(tf_keras))
        )
        assert allowed == (name == "Conv2D 1x1")


def test_only_what_profits_is_pruned() -> None:
    """A 1x1 convolution behind the sparse path stays; those in nested models are found."""
    import keras

    inner_input = keras.Input((8, 8, WIDTH))
    inner = keras.Model(inner_input, block(keras, inner_input), name="inner")

    def end(k: Any, x: Any) -> Any:
        pool = k.layers.GlobalAveragePooling2D()(x)
        return k.layers.Conv2D(3, 1, name="outside")(k.layers.Reshape((1, 1, WIDTH))(pool))

    model = network(keras, middle=lambda k, x: inner(x), end=end)
    policy = PruneForLatencyOnXNNPack()
    policy.ensure_model_supports_pruning(model)
    allowed = [
        layer.name
        for layer in model._flatten_layers(include_self=False)
        if policy.allow_pruning(layer)
    ]
    assert len(allowed) == 3 and "outside" not in allowed
    assert not policy.allow_pruning(keras.layers.Conv2D(3, 1))


def test_the_refusal_names_the_layer() -> None:
    import keras

    pool = keras.layers.MaxPooling2D(name="shrink")
    with pytest.raises(ModelError, match=r"MaxPooling2D 'shrink'.*for its size alone"):
        PruneForLatencyOnXNNPack().ensure_model_supports_pruning(
            network(keras, middle=lambda k, x: pool(x))
        )

    class Mine(keras.Model):
        def call(self, x: Any) -> Any:
            return x

    with pytest.raises(ModelError, match="subclassed"):
        PruneForLatencyOnXNNPack().ensure_model_supports_pruning(Mine())


def test_from_pruning_to_a_sparse_file(tmp_path: Any) -> None:
    """What the policy lets be pruned is what XNNPACK computes sparsely in the file."""
    import keras

    import tfprune.litert
    from tfprune.layers import UpdatePruningStep, prune_low_magnitude, strip_pruning

    model = network(keras, zeros=0.0)
    schedule = load().sparsity.keras.ConstantSparsity(0.75, 0, frequency=1)
    pruned = prune_low_magnitude(model, schedule, pruning_policy=PruneForLatencyOnXNNPack())
    wrapped = [x for x in pruned.layers if getattr(x, "is_pruning_wrapper", False)]
    assert len(wrapped) == 2
    pruned.compile("sgd", "mse")
    pruned.fit(keras.ops.ones((4, 16, 16, 3)), keras.ops.ones((4, 3)), verbose=0,
               callbacks=[UpdatePruningStep()])  # fmt: skip
    with pytest.raises(ModelError, match="strip_pruning"):
        tfprune.litert.export(pruned, tmp_path / "m.tflite", sparse=True)
    report = tfprune.litert.export(strip_pruning(pruned), tmp_path / "m.tflite", sparse=True)
    assert report.sparse is not None and report.sparse.path.verdict == "sparse"
    assert report.sparse.path.sparsity == 0.75
    # and the policy sees through the wrappers
    PruneForLatencyOnXNNPack().ensure_model_supports_pruning(pruned)
