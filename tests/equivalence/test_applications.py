"""Masked ≡ pruned on one model of every family of keras.applications, on some at three ratios.

``python -m benchmarks.applications --output docs/applications.md`` makes the table of all 40, which
takes some 20 minutes more.

The masked model is the original with the consumers' slices of removed channels set to zero, see
tfprune.surgery.verify. Weights and statistics are random, outputs are logits.
"""

from pathlib import Path

import keras
import pytest

import tfprune
from tests.equivalence.applications import MODELS, build, images_for
from tfprune.cost import CostModel

# Float32 sums in another order differ by some 1e-7 of the largest term; over the depth of these
# networks the differences stay below 1e-5 of the largest logit.
TOLERANCE = 1e-5

OF_EACH_FAMILY = (
    "ConvNeXtTiny", "DenseNet121", "EfficientNetB0", "EfficientNetV2B0", "InceptionResNetV2",
    "InceptionV3", "MobileNet", "MobileNetV2", "MobileNetV3Small", "NASNetMobile", "ResNet50",
    "ResNet50V2", "VGG16", "Xception",
)  # fmt: skip

AT_THREE_RATIOS = (
    "ConvNeXtTiny", "DenseNet121", "EfficientNetB0", "MobileNetV2", "MobileNetV3Small", "ResNet50",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_EACH_FAMILY)
def test_masked_equals_pruned(name):
    model = build(name)
    graph = tfprune.analyse(model)
    assert CostModel(graph).frozen_share_of_macs() < 0.05
    images = images_for(model, name, 1)
    for ratio in (0.25, 0.5, 0.75) if name in AT_THREE_RATIOS else (0.5,):
        plan = tfprune.plan(graph, ratio, criterion="random", round_to=1)
        assert set(plan.kept) == {group.name for group in graph.prunable}
        found = tfprune.verify(model, plan, inputs=images, tolerance=TOLERANCE)
        assert found, f"{name} at {ratio}: {found}"
        assert found.magnitude > 0
    del model, graph
    keras.backend.clear_session()


def test_the_table_has_every_model():
    # 40 in Keras 3.15; a new one is picked up by itself, a lost one is noticed.
    assert len(MODELS) >= 40
    table = Path(__file__).parents[2].joinpath("docs", "applications.md").read_text("utf-8")
    assert [name for name in MODELS if f"| {name} |" not in table] == []
