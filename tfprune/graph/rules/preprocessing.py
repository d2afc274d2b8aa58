"""Layers that prepare raw data, and operations on images."""

from __future__ import annotations

from typing import Any

import numpy as np

from tfprune.graph.context import RuleCall
from tfprune.graph.labels import Keep, TensorLabels
from tfprune.graph.rules.registry import layer_rule, op_rule


@layer_rule("Rescaling")
def rescaling(call: RuleCall) -> TensorLabels:
    """``inputs * scale + offset``, numbers or lists with one entry per channel."""
    op, labels = call.op, call.inputs[0]
    for key in ("scale", "offset"):
        value = np.asarray(getattr(op, key))
        if not value.ndim or value.shape[-1] == 1 or labels[-1] is None:
            continue
        if value.ndim > 1 or call.channel_axis() != len(labels) - 1:
            call.freeze(labels, "rescaled by an array")
            return tuple(None for _ in labels)
        known = call.attribute(key, labels[-1])
        if known is not None:

            def rewrite(keep: Keep, key: str = key, value: Any = value, known: Any = known
                        ) -> dict[str, Any]:  # fmt: skip
                return {key: value[keep(known)].tolist()}

            call.config(key, rewrite)
    return labels


@layer_rule(
    "RandomFlip", "RandomRotation", "RandomZoom", "RandomTranslation", "RandomContrast",
    "RandomBrightness", "RandomShear", "RandomPerspective", "RandomElasticTransform",
    "RandomErasing", "RandomInvert", "RandomPosterization", "RandomGaussianBlur", "Solarization",
    "Equalization", "CutMix", "MixUp", "RandomHeight", "RandomWidth",
)  # fmt: skip
def augmentation(call: RuleCall) -> list[TensorLabels]:
    """Nothing happens at inference; in training every channel is treated alike."""
    if len(call.inputs) != 1:
        return raw_data(call)
    channels, axis = call.channels(call.channel_axis()), call.channel_axis()
    return [tuple(channels if a == axis else None for a in range(len(call.inputs[0])))]


@layer_rule(
    "AugMix", "AutoContrast", "ContrastLimitedAdaptiveHistogramEqualization", "Pipeline",
    "MaxNumBoundingBoxes", "RandAugment", "RandomColorDegeneration", "RandomColorJitter",
    "RandomGrayscale", "RandomHue", "RandomSaturation", "RandomSharpness",
)  # fmt: skip
@op_rule("RGBToGrayscale", "RGBToHSV", "HSVToRGB", "SSIM", "PSNR", "MapCoordinates", "SobelEdges",
         symbols=("image.rgb_to_grayscale", "image.rgb_to_hsv", "image.hsv_to_rgb"))  # fmt: skip
def colours(call: RuleCall) -> list[TensorLabels]:
    """Channels are colours."""
    return _frozen(call, f"{type(call.op).__name__} takes channels for colours")


@layer_rule(
    "CategoryEncoding", "Discretization", "Hashing", "HashedCrossing", "MelSpectrogram",
    "STFTSpectrogram",
)  # fmt: skip
@op_rule("OneHot", "MultiHot", symbols=("one_hot",))
def raw_data(call: RuleCall) -> list[TensorLabels]:
    """Raw data go in, and what comes out has a meaning by its position."""
    return _frozen(call, f"{type(call.op).__name__} takes raw data")


def _frozen(call: RuleCall, reason: str) -> list[TensorLabels]:
    for labels in call.inputs:
        call.freeze(labels, reason)
    return [tuple(None for _ in shape) for shape in call.output_shapes]


@layer_rule("StringLookup", "IntegerLookup", "TextVectorization")
def lookup(call: RuleCall) -> list[TensorLabels]:
    """The vocabulary may have come from data: it is in no weight and in no configuration."""
    op = call.op

    def finish(_: Keep, new: Any) -> None:
        if new.vocabulary_size() != op.vocabulary_size():
            new.set_vocabulary(op.get_vocabulary(), _idf_weights(op))

    call.finish(finish)
    return raw_data(call)


def _idf_weights(op: Any) -> Any:
    """Only layers that count with inverse document frequencies have them."""
    table = getattr(op, "_lookup_layer", op)
    weights = getattr(table, "idf_weights_const", None)
    return None if weights is None else np.asarray(weights)


@op_rule("ExtractPatches", "Unfold", "Fold", symbols=("image.extract_patches",))
def patches(call: RuleCall) -> list[TensorLabels]:
    """Windows become channels."""
    return _frozen(call, f"{type(call.op).__name__} mixes channels with positions")
