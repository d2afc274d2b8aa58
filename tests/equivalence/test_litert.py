"""The LiteRT model computes what the Keras model computes, dense and pruned to half.

Networks have random weights and the statistics of random images; see networks.py.
"""

import keras
import numpy as np
import pytest

import tfprune
from tests.equivalence.networks import (
    NETWORKS,
    halved,
    images,
    network,
    relative_difference,
)
from tfprune.litert import Predictor, benchmark, to_litert

# Both sides compute in float32: they add up in different orders, and LiteRT folds batch
# normalisation into the kernels before it. Differences are those that moving the inputs by one
# unit in the last place makes in Keras alone: 4e-7 to 2e-5 of the largest output, growing with
# depth (benchmarks/litert.md). A wrong kernel, padding or channel makes differences near 1.
TOLERANCE = 1e-4

# The same on a GPU, whose float32 kernels may fuse and reorder more.
GPU_TOLERANCE = 1e-3

# Left to benchmarks/litert.py: minutes of conversion, and nothing that the others lack.
LEFT_OUT = (
    "InceptionV3", "NASNetMobile", "DenseNet121", "ResNet50V2", "resnet34", "resnet50",
    "preresnet50", "EfficientNetB0", "Xception", "MobileNet", "vgg_imagenet",
)  # fmt: skip
TESTED = [name for name in NETWORKS if name not in LEFT_OUT]
# Ten seconds and more.
SLOW = {"MobileNetV2", "MobileNetV3Small", "vgg_cifar"}


@pytest.fixture(autouse=True)
def free_memory():
    yield
    keras.backend.clear_session()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in TESTED]
)
def test_float32_equals_keras(name, record_property):
    dense = network(name)
    for form, model in (("dense", dense), ("halved", halved(dense, name))):
        test = images(model, name, 16, seed=4)
        expected = model.predict(test, verbose=0)
        found = relative_difference(expected, Predictor(to_litert(model))(test))
        record_property(f"{form} relative difference", f"{found:.1e}")
        assert np.ptp(expected, axis=0).max() > 1e-2 * np.abs(expected).max(), (
            "images are all alike"
        )
        assert found <= TOLERANCE, f"{name}, {form}"


# The int8 model's largest output need not be Keras's: rounding to 8 bits moves the outputs of these
# two networks by 6 to 23 % of what differs between images, and the largest two outputs of an
# untrained network often lie closer. 89 to 97 % of the images agree (benchmarks/litert.md). Wrong
# scales give noise of 100 %, and agree only where nearly all images are of one class.
@pytest.mark.parametrize("name", ["digits_resnet", "resnet_cifar B"])
def test_int8_mostly_agrees_with_keras(name, record_property, tmp_path):
    dense = network(name)
    for form, model in (("dense", dense), ("halved", halved(dense, name))):
        report = tfprune.export(
            model,
            tmp_path / "int8.tflite",
            quantize="int8",
            calibration=images(model, name, 64, seed=3),
            check=False,
        )
        test = images(model, name, 128, seed=4)
        expected = model.predict(test, verbose=0)
        received = Predictor(report.path)(test)
        agreement = np.mean(received.argmax(-1) == expected.argmax(-1))
        spread = expected - expected.mean(0)
        noise = (received - expected).std() / spread.std()
        record_property(f"{form} top-1 agreement", f"{agreement:.3f}")
        record_property(f"{form} noise", f"{noise:.3f}")
        assert agreement >= 0.7, f"{name}, {form}"
        assert noise <= 0.5, f"{name}, {form}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["resnet_cifar A"])
def test_gpu_equals_cpu(name, record_property):
    dense = network(name)
    for form, model in (("dense", dense), ("halved", halved(dense, name))):
        run = benchmark(to_litert(model), runs=1, warmup=0, gpu=True).gpu
        if run.status == "no driver":
            pytest.skip(run.message)
        assert run.delegated, f"{name}, {form}: {run}"
        record_property(f"{form} relative difference on the GPU", f"{run.relative_difference:.1e}")
        assert run.relative_difference <= GPU_TOLERANCE, f"{name}, {form}"
