"""What the zoo's networks compute, and what they refuse."""

import ast
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from tfprune import zoo
from tfprune.errors import ArgumentError

SMALL = [
    pytest.param(lambda **k: zoo.resnet_cifar(8, **k), (32, 32, 3), id="resnet"),
    pytest.param(lambda **k: zoo.resnet_cifar(8, shortcut="B", **k), (32, 32, 3), id="resnet B"),
    pytest.param(lambda **k: zoo.vgg_cifar(11, hidden=16, **k), (32, 32, 3), id="vgg"),
    pytest.param(lambda **k: zoo.densenet_cifar(10, **k), (32, 32, 3), id="densenet"),
    pytest.param(lambda **k: zoo.preresnet_cifar(11, **k), (32, 32, 3), id="preresnet"),
    pytest.param(lambda **k: zoo.digits_resnet(**k), (8, 8, 1), id="digits"),
    pytest.param(
        lambda **k: zoo.resnet50(input_shape=(32, 32, 3), inner_widths=[(8, 8)] * 4, **k),
        (32, 32, 3),
        id="resnet50",
    ),
    pytest.param(
        lambda **k: zoo.vgg_imagenet(11, head="average", input_shape=(32, 32, 3), **k),
        (32, 32, 3),
        id="vgg imagenet",
    ),
]


@pytest.mark.parametrize(("build", "shape"), SMALL)
def test_logits_or_probabilities(build, shape) -> None:
    images = np.random.default_rng(0).random((3, *shape), dtype=np.float32)
    logits = build(classes=7, seed=1).predict(images, verbose=0)
    probabilities = build(classes=7, seed=1, classifier_activation="softmax").predict(
        images, verbose=0
    )
    assert logits.shape == (3, 7)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    # Float32 softmax of a handful of numbers: a few units in the last place.
    np.testing.assert_allclose(
        probabilities, powers / powers.sum(axis=1, keepdims=True), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize(("build", "shape"), SMALL)
def test_a_seed_fixes_the_initial_weights(build, shape) -> None:
    first, same, other = (build(seed=seed).get_weights() for seed in (3, 3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))
    kernels = [(a, b) for a, b in zip(first, other, strict=True) if a.ndim > 1]
    assert kernels and not any(np.array_equal(a, b) for a, b in kernels)
    # Two layers of one shape must not start equal either.
    shapes: dict[tuple[int, ...], list[np.ndarray]] = {}
    for kernel, _ in kernels:
        shapes.setdefault(kernel.shape, []).append(kernel)
    for same_shape in shapes.values():
        assert len({kernel.tobytes() for kernel in same_shape}) == len(same_shape)


def test_initial_values_are_the_reference_codes() -> None:
    model = zoo.vgg_cifar(16, seed=0)
    kernel = model.get_layer("stage4_2_conv").kernel.numpy()
    # 2.4 million normal draws: the standard error of the deviation is 0.05 %.
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 512)), rel=0.005)
    norm = model.get_layer("stage4_2_bn")
    assert np.all(norm.gamma.numpy() == 0.5)
    assert (norm.epsilon, norm.momentum) == (1e-5, 0.9)


def test_shortcut_a_subsamples_and_pads_with_zeros() -> None:
    model = zoo.resnet_cifar(8, seed=0)
    entry, exit_ = (
        model.get_layer("stage2_block1_add").input[0],
        model.get_layer("stage1_block1_relu"),
    )
    probe = keras.Model(model.input, [exit_.output, entry])
    before, after = probe.predict(
        np.random.default_rng(0).random((2, 32, 32, 3), dtype=np.float32), verbose=0
    )
    assert after.shape == (2, 16, 16, 32)
    assert np.array_equal(after[..., 8:24], before[:, ::2, ::2, :])
    assert not after[..., :8].any() and not after[..., 24:].any()


def test_stride_two_convolutions_pad_both_sides() -> None:
    model = zoo.resnet_cifar(8, seed=0)
    conv = model.get_layer("stage2_block1_1_conv")
    source, kernel = model.get_layer("stage1_block1_relu").output, conv.kernel.numpy()
    before, after = keras.Model(model.input, [source, conv.output]).predict(
        np.random.default_rng(0).random((1, 32, 32, 3), dtype=np.float32), verbose=0
    )
    # The top left output sees one row and one column of zeros.
    expected = np.einsum("yxc,yxcf->f", before[0, :2, :2], kernel[1:, 1:])
    # 64 float32 products of about one.
    np.testing.assert_allclose(after[0, 0, 0], expected, rtol=1e-4, atol=1e-5)


def test_sampled_blocks_read_the_sampled_channels_only() -> None:
    sampled = [32, *[256] * 2, *[256], *[512] * 3, *[512], *[1024] * 5, *[1024], *[2048] * 2]
    model = zoo.resnet50(input_shape=(32, 32, 3), sampled_inputs=sampled, seed=0)
    assert model.get_layer("stage1_block1_1_conv").kernel.shape[2] == 32
    with pytest.raises(ArgumentError, match="64 input channels"):
        zoo.resnet50(input_shape=(32, 32, 3), sampled_inputs=[65, *sampled[1:]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: zoo.resnet_cifar(57), r"6 n \+ 2.*57"),
        (lambda: zoo.resnet_cifar(2), r"6 n \+ 2"),
        (lambda: zoo.resnet_cifar(20, shortcut="C"), "'A' or 'B'.*'C'"),
        (lambda: zoo.resnet_cifar(8, widths=(16, 32)), "3 stage widths.*2"),
        (lambda: zoo.resnet_cifar(8, inner_widths=(1, 2)), "3 inner widths"),
        (lambda: zoo.resnet_cifar(8, inner_widths=(1, 0, 2)), "positive whole numbers.*0"),
        (lambda: zoo.resnet_cifar(8, inner_widths=(1, 2.5, 2)), "positive whole numbers.*2.5"),
        (lambda: zoo.resnet_cifar(8, widths=(16, 8, 8)), "only add channels"),
        (lambda: zoo.resnet_cifar(8, input_shape=(32, 32)), r"\(height, width, channels\)"),
        (lambda: zoo.vgg_cifar(12), r"\[11, 13, 16, 19\]; received 12"),
        (lambda: zoo.vgg_cifar(16, widths=((1, 2), (3, 4))), "5 stages"),
        (lambda: zoo.vgg_cifar(11, widths=((1,), (2,), (3,), (4, 4), (5, 5))), "stage 3 of VGG-11"),
        (lambda: zoo.vgg_cifar(11, input_shape=(16, 16, 3)), "32 pixels"),
        (lambda: zoo.vgg_imagenet(head="gap"), "'dense' or 'average'"),
        (lambda: zoo.densenet_cifar(41), r"3 n \+ 4"),
        (lambda: zoo.densenet_cifar(40, compression=0.0), "compression"),
        (lambda: zoo.preresnet_cifar(20, widths=(1, 2)), "3 stage widths"),
        (lambda: zoo.preresnet_cifar(57), r"9 n \+ 2.*57"),
        (lambda: zoo.preresnet50((0, 4, 6, 3)), "Stage 1"),
        (lambda: zoo.preresnet50((4, 6, 3), first_branch=(True,) * 3), "four stages"),
        (lambda: zoo.resnet50(stride_in="2x2"), "'3x3' or '1x1'"),
        (lambda: zoo.resnet50(inner_widths=[(1, 1)] * 5), "4 or 16 pairs"),
        (lambda: zoo.resnet50(inner_widths=[(1,)] * 4), "2 inner widths"),
        (lambda: zoo.resnet34(inner_widths=(1,) * 15), "16 inner widths"),
    ],
)
def test_bad_requests_are_refused(call, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


def test_channels_first_is_refused() -> None:
    keras.config.set_image_data_format("channels_first")
    try:
        with pytest.raises(ArgumentError, match="channels_last"):
            zoo.resnet_cifar(8)
    finally:
        keras.config.set_image_data_format("channels_last")


def test_importing_the_zoo_is_light() -> None:
    code = (
        "import sys, tfprune.zoo, tfprune.data, tfprune.protocols, tfprune.batches;"
        "heavy = {'keras', 'tensorflow', 'tf_keras', 'tensorflow_datasets', 'sklearn'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_zoo_names_no_backend() -> None:
    """Any Keras 3 backend will do; importing one is what would end that."""
    for path in Path(zoo.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or node.names[0].name
                assert module.split(".")[0] not in ("tensorflow", "jax", "torch"), path
