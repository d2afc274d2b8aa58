"""Random masks: exact counts, one seed one draw."""

from __future__ import annotations

import numpy as np
import pytest

from tests.methods.models import mlp
from tests.toys import residual
from tfprune.errors import ArgumentError
from tfprune.layers import prunable_weights
from tfprune.methods import RandomPruning


def test_every_layer_keeps_its_count() -> None:
    model = residual()
    masks = RandomPruning(0.7).masks(model)

    for path, variable in prunable_weights(model).items():
        size = int(np.prod(variable.shape))
        assert masks[path].sum() == round(size * (1 - 0.7)), path


def test_jointly_the_network_keeps_its_count() -> None:
    model = residual()
    masks = RandomPruning(0.7, per_layer=False).masks(model)

    assert masks.kept == round(masks.count * (1 - 0.7))
    # Layers are hit by chance: 6 binomial fractions are hardly ever all the rounded ones.
    assert masks != RandomPruning(0.7).masks(model)
    assert len(set(np.round(list(masks.sparsities.values()), 6))) > 1


@pytest.mark.parametrize("per_layer", [True, False])
def test_the_seed_decides_and_names_and_values_do_not(per_layer) -> None:
    def masks(model_seed, seed):
        model = mlp(widths=(20, 20), features=20, seed=model_seed)
        return RandomPruning(0.5, seed=seed, per_layer=per_layer).masks(model)

    assert masks(0, 1) == masks(7, 1)
    assert masks(0, 1) != masks(0, 2)


def test_layers_of_one_shape_differ() -> None:
    masks = RandomPruning(0.5).masks(mlp(widths=(20, 20, 20), features=20))

    assert not np.array_equal(masks["fc2/kernel"], masks["fc3/kernel"])


def test_a_layer_too_small_for_the_sparsity_is_named() -> None:
    model = mlp(widths=(1,), features=2, classes=2)

    with pytest.raises(ArgumentError, match="nothing of 'fc1/kernel', 'head/kernel'"):
        RandomPruning(0.9).masks(model)
    assert RandomPruning(0.9, allow_empty_layers=True).masks(model).kept == 0


@pytest.mark.parametrize("arguments", [(1.0,), (0.5, -1), (0.5, 1.5)])
def test_arguments_out_of_range(arguments) -> None:
    with pytest.raises(ArgumentError):
        RandomPruning(*arguments)
