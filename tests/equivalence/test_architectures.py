"""Families of architectures: what can be pruned, masked ≡ pruned, saved, loaded and trained on."""

import keras
import numpy as np
import pytest

import tfprune
from tests.equivalence import architectures
from tfprune.graph.evaluate import call_model
from tfprune.graph.trace import map_leaves
from tfprune.testing import check_surgery, randomize

# The widths of all groups that can be pruned, and of those that cannot, in the order of the model.
# Frozen are outputs, and what the network's own arithmetic ties to positions.
WIDTHS = {
    architectures.unet: ([8, 8, 12, 12, 16, 12, 12, 12, 8, 8, 8], [2]),
    architectures.detector: ([8, 12, 16, 8, 10], [4, 4]),
    architectures.text_encoder: ([16, 4, 4, 4, 32, 4, 4, 4, 32], [3]),
    architectures.vision_transformer: ([16, 4, 4, 4, 32, 4, 4, 4, 32], [3]),
    # Two groups of eight channels, shuffled: offsets c and c + 4 go together.
    architectures.shufflenet: ([8, 4, 4], [3]),
    architectures.squeeze_and_excite: ([16, 4, 4], [3]),
    # The gate of spatial attention has one channel.
    architectures.cbam: ([16, 4, 12], [1, 3]),
    architectures.siamese: ([8, 12, 10], [1]),
    architectures.cnn_lstm: ([6, 3, 8, 10, 9, 7], [3]),
    architectures.wavenet: ([8, 12, 12, 12, 10, 6], [4]),
    architectures.generator: ([12, 10, 8], [3]),
    architectures.densenet_bc: ([8, 16, 4, 16, 4, 8, 16, 4, 16, 4, 8], [3]),
    architectures.repvgg: ([12, 16], [3]),
    # What is mixed over the sixteen patches is added to them.
    architectures.mlp_mixer: ([10, 12, 20, 12, 20], [16, 16, 3]),
    # Units of encoder and decoder meet in a product without weights.
    architectures.translator: ([8, 8, 9], [12, 20]),
    architectures.tabular: ([4, 3, 16, 11], [1]),
}


@pytest.mark.parametrize("build", WIDTHS, ids=lambda build: build.__name__)
def test_architecture(build, tmp_path):
    keras.utils.set_random_seed(0)
    model = randomize(build())
    graph = tfprune.analyse(model)
    prunable, frozen = WIDTHS[build]
    assert sorted(g.width for g in graph.prunable) == sorted(prunable)
    assert sorted(g.width for g in graph if not g.prunable) == sorted(frozen)

    # Up to some twenty float32 layers with normalisation, which divides by small deviations.
    plan = check_surgery(model, tolerance=1e-4)
    assert len(plan.kept) == len(prunable)
    small = plan.apply(model)
    small.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    random = np.random.default_rng(0)
    batch = [
        random.integers(0, 2, (4, *ref.shape[1:])).astype(ref.dtype) for ref in graph.trace.inputs
    ]
    for a, b in zip(call_model(small, batch), call_model(loaded, batch), strict=True):
        np.testing.assert_array_equal(a, b)

    known = dict(zip([ref.key for ref in graph.trace.inputs], batch, strict=True))
    x = map_leaves(lambda ref: known[ref.key], graph.trace.input_structure)
    x = batch[0] if isinstance(small, keras.Sequential) else x
    targets = keras.tree.map_structure(lambda y: np.zeros(y.shape, "float32"), small(x))
    before = [np.asarray(weight).copy() for weight in small.trainable_variables]
    small.compile(optimizer="sgd", loss="mse")
    assert np.isfinite(small.train_on_batch(x, targets)).all()
    after = [np.asarray(weight) for weight in small.trainable_variables]
    assert any((a != b).any() for a, b in zip(before, after, strict=True))
