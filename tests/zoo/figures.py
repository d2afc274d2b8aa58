"""Published and recounted sizes of networks: the one table of them, for every test that counts.

Each row names the paper, and what it prints where that is worth comparing: the integers are
recounted from the definition of the network (for the rows marked "counted here", by the counter
beside this file alone; it rounds to the printed figure where there is one). Parameters are the
trainable ones, batch normalisation included; MACs are those of convolutions and dense layers, for
one example, biases not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tfprune import zoo
from tfprune.zoo.published import CHANNEL_PRUNING_2X_SAMPLED


@dataclass(frozen=True)
class Figure:
    """A network and its size."""

    name: str
    build: Callable[[], Any]
    parameters: int
    macs: int
    source: str


def _application(name: str) -> Any:
    import keras

    return getattr(keras.applications, name)(weights=None)


def _resnet(depth: int, **options: Any) -> Callable[[], Any]:
    return partial(zoo.resnet_cifar, depth, **options)


def _thinet(name: str, stride_in: str) -> Callable[[], Any]:
    return partial(zoo.resnet50, inner_widths=zoo.RESNET50_INNER[name], stride_in=stride_in)


def _pruned(model: Callable[..., Any], name: str, depth: int) -> Callable[[], Any]:
    return partial(model, depth, inner_widths=zoo.RESNET_INNER[name])


def _resnet34(name: str) -> Callable[[], Any]:
    return partial(zoo.resnet34, inner_widths=zoo.RESNET_INNER[name])


def _vgg(name: str, depth: int, **options: Any) -> Callable[[], Any]:
    return partial(zoo.vgg_cifar, depth, widths=zoo.VGG_CIFAR[name], **options)


def _vgg_imagenet(name: str, **options: Any) -> Callable[[], Any]:
    return partial(zoo.vgg_imagenet, widths=zoo.VGG_IMAGENET[name], **options)


_densenet_bc = partial(zoo.densenet_cifar, 100, bottleneck=True, compression=0.5)

LI = "Li et al. 2017, arXiv:1608.08710"
SLIMMING = "Liu et al. 2017, arXiv:1708.06519"
RETHINKING = "Liu et al. 2019, arXiv:1810.05270"
THINET = "Luo et al. 2017, arXiv:1707.06342"
SLIM_HERE = f"{SLIMMING}; MACs counted here"
LASSO = "He, Zhang, Sun 2017, arXiv:1707.06168"
SSS = "Huang, Wang 2018, arXiv:1707.01213"
HE = "He et al. 2016, arXiv:1512.03385"


def _conv(size: int, kernel: int, inputs: int, outputs: int) -> int:
    return size * size * kernel * kernel * inputs * outputs


def _mobilenet_v2() -> int:
    """MACs of MobileNetV2 1.0 at 224x224, from table 2 of arXiv:1801.04381 (300.8 M)."""
    total, size, inputs = _conv(112, 3, 3, 32), 112, 32
    for expansion, outputs, count, stride in (
        *[(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)],
        *[(6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)],
    ):
        for block in range(count):
            wide = inputs * expansion
            total += _conv(size, 1, inputs, wide) if expansion > 1 else 0
            size //= stride if block == 0 else 1
            total += _conv(size, 3, 1, wide) + _conv(size, 1, wide, outputs)
            inputs = outputs
    return total + _conv(7, 1, 320, 1280) + 1280 * 1000


def _resnet56() -> int:
    """MACs of ResNet-56 with shortcut A: three stages of 18 convolutions."""
    first = _conv(32, 3, 3, 16)
    stages = 18 * _conv(32, 3, 16, 16)
    stages += _conv(16, 3, 16, 32) + 17 * _conv(16, 3, 32, 32)
    stages += _conv(8, 3, 32, 64) + 17 * _conv(8, 3, 64, 64)
    return first + stages + 64 * 10


FIGURES: tuple[Figure, ...] = (
    # CIFAR ResNets, shortcuts A (zeros) and B (projection with batch normalisation).
    Figure("ResNet-20", _resnet(20), 269_722, 40_551_040, HE),
    Figure("ResNet-32", _resnet(32), 464_154, 68_862_592, HE),
    Figure("ResNet-44", _resnet(44), 658_586, 97_174_144, HE),
    Figure("ResNet-56", _resnet(56), 853_018, _resnet56(), f"{HE}; 8.5e5, 1.25e8 in {LI}"),
    Figure("ResNet-110", _resnet(110), 1_727_962, 252_887_680, f"{HE}; 1.72e6, 2.53e8 in {LI}"),
    Figure("ResNet-20 B", _resnet(20, shortcut="B"), 272_474, 40_813_184, HE),
    Figure("ResNet-32 B", _resnet(32, shortcut="B"), 466_906, 69_124_736, HE),
    Figure("ResNet-56 B", _resnet(56, shortcut="B"), 855_770, 125_747_840, HE),
    Figure("ResNet-110 B", _resnet(110, shortcut="B"), 1_730_714, 253_149_824, HE),
    # Li et al., table 1.
    Figure(
        "ResNet-56-A",
        _pruned(zoo.resnet_cifar, "resnet56-a", 56),
        773_336,
        112_435_840,
        f"{LI}: 7.7e5, 1.12e8",
    ),
    Figure(
        "ResNet-56-B",
        _pruned(zoo.resnet_cifar, "resnet56-b", 56),
        735_712,
        90_907_264,
        f"{LI}: 7.3e5, 9.09e7",
    ),
    Figure(
        "ResNet-110-A",
        _pruned(zoo.resnet_cifar, "resnet110-a", 110),
        1_688_522,
        212_779_648,
        f"{LI}: 1.68e6, 2.13e8",
    ),
    Figure(
        "ResNet-110-B",
        _pruned(zoo.resnet_cifar, "resnet110-b", 110),
        1_168_424,
        155_124_352,
        f"{LI}: 1.16e6, 1.55e8",
    ),
    Figure(
        "VGG-16 (Li)",
        partial(zoo.vgg_cifar, 16, hidden=512),
        14_987_722,
        313_463_808,
        f"{LI}: 1.5e7, 3.13e8",
    ),
    Figure(
        "VGG-16-A",
        _vgg("vgg16-a", 16, hidden=512),
        5_397_034,
        206_279_680,
        f"{LI}: 5.4e6, 2.06e8",
    ),
    # Li et al. print ResNet-34 without the projections: 2.16e7 parameters, 3.64e9 MACs.
    Figure("ResNet-34", zoo.resnet34, 21_797_672, 3_663_761_408, LI),
    Figure("ResNet-34-A", _resnet34("resnet34-a"), 20_151_764, 3_100_184_576, LI),
    Figure("ResNet-34-B", _resnet34("resnet34-b"), 19_469_372, 2_782_269_440, LI),
    Figure(
        "ResNet-34-C",
        partial(zoo.resnet34, widths=(64, 128, 204, 512)),
        20_206_160,
        3_391_105_024,
        LI,
    ),
    # Network Slimming and the networks of Liu et al. 2019.
    Figure("VGG-16", partial(zoo.vgg_cifar, 16), 14_724_042, 313_201_664, SLIMMING),
    Figure("VGG-19", partial(zoo.vgg_cifar, 19), 20_035_018, 398_136_320, f"{SLIMMING}: 20.04M"),
    Figure(
        "VGG-19, 100 classes",
        partial(zoo.vgg_cifar, 19, classes=100),
        20_081_188,
        398_136_320 + 512 * 90,
        SLIMMING,
    ),
    Figure(
        "VGG-16 with biases",
        partial(zoo.vgg_cifar, 16, conv_bias=True),
        14_728_266,
        313_201_664,
        RETHINKING,
    ),
    Figure(
        "VGG-19 with biases",
        partial(zoo.vgg_cifar, 19, conv_bias=True),
        20_040_522,
        398_136_320,
        RETHINKING,
    ),
    Figure("VGG-19 slim 50 %", _vgg("vgg19-slim-50", 19), 4_612_633, 231_604_302, SLIMMING),
    Figure("VGG-19 slim 60 %", _vgg("vgg19-slim-60", 19), 3_139_700, 221_911_158, SLIM_HERE),
    Figure("VGG-19 slim 70 %", _vgg("vgg19-slim-70", 19), 2_366_600, 208_326_092, SLIM_HERE),
    Figure("VGG-16 slim 60 %", _vgg("vgg16-slim-60", 16), 2_472_429, 181_085_138, RETHINKING),
    Figure("VGG-16 guided", _vgg("vgg16-guided", 16), 2_357_764, 176_414_844, RETHINKING),
    Figure(
        "VGG-19 transferred",
        _vgg("vgg19-transferred", 19, classes=100),
        3_098_909,
        213_417_552,
        RETHINKING,
    ),
    Figure("VGG-16 uniform 60 %", _vgg("vgg16-uniform-60", 16), 2_360_974, 50_633_422, RETHINKING),
    Figure(
        "PreResNet-164",
        partial(zoo.preresnet_cifar, 164),
        1_703_258,
        247_646_720,
        f"{SLIMMING}: 1.70M",
    ),
    Figure(
        "PreResNet-164, 100 classes",
        partial(zoo.preresnet_cifar, 164, classes=100),
        1_726_388,
        247_646_720 + 256 * 90,
        SLIMMING,
    ),
    Figure("PreResNet-110", partial(zoo.preresnet_cifar, 110), 1_146_842, 167_430_656, RETHINKING),
    Figure(
        "DenseNet-40",
        zoo.densenet_cifar,
        1_059_298,
        282_917_328,
        f"{SLIMMING}, PyTorch code: 1.06M",
    ),
    Figure(
        "DenseNet-40, 100 classes",
        partial(zoo.densenet_cifar, classes=100),
        1_100_428,
        282_917_328 + 456 * 90,
        SLIMMING,
    ),
    Figure(
        "DenseNet-40, 16 initial channels",
        partial(zoo.densenet_cifar, initial=16),
        1_019_722,
        264_812_928,
        f"{SLIMMING}: 1.02M",
    ),
    Figure("DenseNet-BC-100", _densenet_bc, 769_162, 287_929_692, RETHINKING),
    Figure(
        "DenseNet-BC-100, 16 initial channels",
        partial(_densenet_bc, initial=16),
        754_810,
        278_490_440,
        f"{RETHINKING}; MACs counted here",
    ),
    # ThiNet; the paper's billions are twice the MACs (counted here, except the full networks).
    Figure(
        "VGG-16, ImageNet",
        zoo.vgg_imagenet,
        138_357_544,
        15_346_630_656 + 123_633_664,
        f"{THINET}: 138.34M, 30.94B; {LASSO}",
    ),
    Figure(
        "VGG-Conv",
        _vgg_imagenet("vgg-conv"),
        131_452_552,
        4_791_205_888,
        f"{THINET}: 131.44M, 9.58B",
    ),
    Figure(
        "VGG-GAP",
        _vgg_imagenet("vgg-conv", head="average"),
        8_322_696,
        4_668_084_224,
        f"{THINET}: 8.32M, 9.34B",
    ),
    Figure(
        "VGG-Tiny",
        _vgg_imagenet("vgg-tiny", head="average"),
        1_325_368,
        1_004_578_816,
        f"{THINET}: 1.32M, 2.01B",
    ),
    Figure(
        "ResNet-50, stride in 1x1",
        partial(zoo.resnet50, stride_in="1x1"),
        25_557_032,
        3_857_973_248,
        f"{THINET}: 25.56M, 7.72B; {LASSO}",
    ),
    Figure("ResNet-50, stride in 3x3", zoo.resnet50, 25_557_032, 4_089_184_256, HE),
    Figure(
        "ThiNet-70",
        _thinet("thinet-70", "1x1"),
        16_945_246,
        2_440_026_340,
        f"{THINET}: 16.94M, 4.88B",
    ),
    Figure(
        "ThiNet-50",
        _thinet("thinet-50", "1x1"),
        12_381_864,
        1_706_426_368,
        f"{THINET}: 12.38M, 3.41B",
    ),
    Figure(
        "ThiNet-30",
        _thinet("thinet-30", "1x1"),
        8_665_318,
        1_097_492_539,
        f"{THINET}: 8.66M, 2.20B",
    ),
    Figure(
        "ThiNet-70, stride in 3x3", _thinet("thinet-70", "3x3"), 16_945_246, 2_601_392_356, THINET
    ),
    Figure(
        "ThiNet-50, stride in 3x3", _thinet("thinet-50", "3x3"), 12_381_864, 1_822_031_872, THINET
    ),
    Figure(
        "ThiNet-30, stride in 3x3", _thinet("thinet-30", "3x3"), 8_665_318, 1_166_283_835, THINET
    ),
    # Channel pruning by LASSO.
    Figure(
        "VGG-16 5x",
        _vgg_imagenet("channel-pruning-5x"),
        130_879_294,
        3_391_649_856 + 123_633_664,
        LASSO,
    ),
    Figure(
        "ResNet-50 2x, stride in 1x1",
        partial(
            zoo.resnet50,
            stride_in="1x1",
            inner_widths=zoo.RESNET50_INNER["channel-pruning-2x"],
            sampled_inputs=CHANNEL_PRUNING_2X_SAMPLED,
        ),
        19_693_584,
        2_599_320_244,
        LASSO,
    ),
    Figure(
        "ResNet-50 2x, stride in 3x3",
        partial(
            zoo.resnet50,
            inner_widths=zoo.RESNET50_INNER["channel-pruning-2x"],
            sampled_inputs=CHANNEL_PRUNING_2X_SAMPLED,
        ),
        19_693_584,
        2_730_129_076,
        LASSO,
    ),
    Figure(
        "VGG-11 with batch normalisation, ImageNet",
        partial(zoo.vgg_imagenet, 11, batch_norm=True),
        132_868_840,
        7_609_090_048,
        SLIMMING,
    ),
    # Sparse structure selection.
    Figure("PreResNet-50", zoo.preresnet50, 25_549_480, 4_089_184_256, f"{SSS}: 25.5M, 4.09G"),
    Figure(
        "ResNet-41 (SSS)",
        partial(zoo.preresnet50, (0, 4, 6, 3), first_branch=(False, True, True, True)),
        25_351_080,
        3_472_621_568,
        f"{SSS}: 25.3M, 3.47G",
    ),
    Figure(
        "ResNet-32 (SSS), code of Liu et al.",
        partial(zoo.preresnet50, (1, 4, 4, 1), first_branch=(False, True, True, True)),
        14_261_928,
        2_817_523_712,
        RETHINKING,
    ),
    Figure(
        "ResNet-32 (SSS), fitted to the paper",
        partial(zoo.preresnet50, (0, 4, 4, 2), first_branch=(False, True, True, True)),
        18_654_120,
        2_817_523_712,
        f"{SSS}: 18.6M, 2.82G",
    ),
    Figure(
        "ResNet-26 (SSS), code of Liu et al.",
        partial(zoo.preresnet50, (0, 2, 5, 1), first_branch=(False, False, False, True)),
        14_915_496,
        2_278_031_360,
        RETHINKING,
    ),
    Figure(
        "ResNet-26 (SSS), fitted to the paper",
        partial(zoo.preresnet50, (0, 1, 6, 1), first_branch=(False, False, True, True)),
        15_619_496,
        2_329_411_584,
        f"{SSS}: 15.6M, 2.33G",
    ),
    # keras.applications: convolution biases, which MACs leave out, and the stride in the 1x1.
    Figure("keras ResNet50", partial(_application, "ResNet50"), 25_583_592, 3_857_973_248, HE),
    Figure("keras ResNet50V2", partial(_application, "ResNet50V2"), 25_568_360, 3_482_255_360, HE),
    Figure(
        "keras MobileNetV2",
        partial(_application, "MobileNetV2"),
        3_504_872,
        _mobilenet_v2(),
        "arXiv:1801.04381: 300.8 M",
    ),
)
