"""The widths that pruning papers published, as data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

Stages = tuple[tuple[int, ...], ...]

# Li et al. 2017 (arXiv:1608.08710), table 1 and section 4: the ratios are printed, the widths
# follow from kept = int(channels * (1 - ratio)).
RESNET_INNER: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "resnet56-a": (*[14] * 7, 16, 14, *[32], *[28] * 8, *[64], *[57] * 7, 64),
        "resnet56-b": (*[6] * 7, 16, 16, 32, *[22] * 6, 32, 22, 64, *[57] * 7, 64),
        "resnet110-a": (*[8] * 17, 16, *[32] * 18, *[64] * 18),
        "resnet110-b": (*[8] * 17, 16, 32, *[19] * 17, 64, *[44] * 17),
        "resnet34-a": (64, 44, 44, 128, 89, 89, 128, 256, *[179] * 4, 256, *[512] * 3),
        "resnet34-b": (64, 32, 32, 128, 51, 51, 128, 256, *[153] * 4, 256, *[512] * 3),
    }
)
"""Widths of the first convolution of every block, for ``resnet_cifar`` and ``resnet34``."""

RESNET50_INNER: Mapping[str, Stages] = MappingProxyType(
    {
        # ThiNet: int(0.7 p), int(0.5 p), int(0.3 p); the number is the percentage kept.
        "thinet-70": ((44, 44), (89, 89), (179, 179), (358, 358)),
        "thinet-50": ((32, 32), (64, 64), (128, 128), (256, 256)),
        "thinet-30": ((19, 19), (38, 38), (76, 76), (153, 153)),
        # He, Zhang, Sun 2017 (arXiv:1707.06168), one pair per block.
        "channel-pruning-2x": (
            *[(64, 55), (51, 39), (50, 37)],
            *[(128, 106), (105, 72), (105, 72), (128, 110)],
            *[(256, 225), (209, 147), (204, 158), (212, 155), (211, 148), (256, 213)],
            *[(512, 433), (512, 437), (512, 440)],
        ),
    }
)
"""Widths of the first two convolutions of the bottlenecks, for ``resnet50``."""

CHANNEL_PRUNING_2X_SAMPLED = (
    *[35, 101, 97],
    *[144, 205, 198, 288],
    *[278, 418, 407, 423, 412, 595],
    *[606, 1222, 1147],
)
"""Input channels that each block of "channel-pruning-2x" reads."""

VGG_CIFAR: Mapping[str, Stages] = MappingProxyType(
    {
        # Li et al. 2017: half of convolution 1 and of 8 to 13. VGG-16, hidden=512.
        "vgg16-a": ((32, 64), (128, 128), (256,) * 3, (256,) * 3, (256,) * 3),
        # Network Slimming, a public re-implementation's VGG-19 at ratios .5, .6 and .7.
        "vgg19-slim-50": (
            (52, 64),
            (128, 128),
            (256, 254, 245, 214),
            (179, 117, 116, 229),
            (228, 220, 210, 111),
        ),
        "vgg19-slim-60": (
            (51, 64),
            (128, 128),
            (256, 254, 245, 213),
            (165, 85, 92, 153),
            (83, 86, 87, 111),
        ),
        "vgg19-slim-70": (
            (49, 64),
            (128, 128),
            (256, 254, 234, 198),
            (114, 41, 24, 11),
            (14, 13, 19, 104),
        ),
        # Liu et al. 2019 (arXiv:1810.05270): VGG-16 with 60 % of all channels removed by Network
        # Slimming, the average of five runs, rounded; and the networks guided by it. The averages
        # are known at second hand and add up to the printed totals.
        "vgg16-slim-60": ((39, 64), (128, 128), (255, 250, 226), (217, 120, 63), (48, 62, 89)),
        "vgg16-guided": ((52,) * 2, (128,) * 2, (244,) * 3, (133,) * 3, (66,) * 3),
        "vgg19-transferred": ((52,) * 2, (128,) * 2, (244,) * 4, (133,) * 4, (66,) * 4),
        "vgg16-uniform-60": ((26,) * 2, (51,) * 2, (102,) * 3, (205,) * 3, (205,) * 3),
    }
)
"""Widths of the convolutions by stage, for ``vgg_cifar``."""

VGG_IMAGENET: Mapping[str, Stages] = MappingProxyType(
    {
        # ThiNet (arXiv:1707.06342). VGG-GAP is "vgg-conv" with head="average", VGG-Tiny as well.
        "vgg-conv": ((32, 32), (64, 64), (128,) * 3, (256,) * 3, (512,) * 3),
        "vgg-tiny": ((16, 16), (32, 32), (64,) * 3, (128,) * 3, (128, 128, 256)),
        # He, Zhang, Sun 2017.
        "channel-pruning-5x": (
            (24, 22),
            (41, 51),
            (108, 89, 111),
            (184, 276, 228),
            (512, 512, 512),
        ),
    }
)
"""Widths of the convolutions by stage, for ``vgg_imagenet``."""
