"""Thresholds by standard deviation, layer by layer and round by round."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.methods.models import lenet_5, lenet_300_100, mlp, same, snapshot
from tfprune.errors import ArgumentError
from tfprune.layers import Masks, masks_of, prunable_weights
from tfprune.methods import Han, corrected_dropout
from tfprune.methods.han import std_mask


@pytest.mark.parametrize("quality", [0.25, 0.5, 0.6745, 0.75, 1.0, 1.25, 1.5, 2.0])
def test_normal_weights_lose_what_the_normal_distribution_says(quality) -> None:
    count = 400_000
    weights = np.random.default_rng(0).normal(0.0, 0.03, count)
    expected = math.erf(quality / math.sqrt(2))  # P(|w| <= q s)

    pruned = 1 - std_mask(weights, quality).mean()

    # Four standard errors of a binomial fraction; the threshold's own error is smaller.
    assert abs(pruned - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_the_fractions_of_the_sheet() -> None:
    qualities = (0.25, 0.5, 0.6745, 0.75, 1, 1.25, 1.5, 2)
    fractions = [round(100 * math.erf(q / math.sqrt(2)), 2) for q in qualities]

    assert fractions == [19.74, 38.29, 50.0, 54.67, 68.27, 78.87, 86.64, 95.45]


def test_the_threshold_is_per_layer() -> None:
    model = mlp(widths=(40, 30))
    weights = {path: np.asarray(v) for path, v in prunable_weights(model).items()}
    weights["fc1/kernel"] *= 100  # what is small here would be large elsewhere
    prunable_weights(model)["fc1/kernel"].assign(weights["fc1/kernel"])

    masks = Han(quality=0.8).masks(model)

    for path, weight in weights.items():
        threshold = 0.8 * np.std(weight.astype(np.float64))
        np.testing.assert_array_equal(masks[path], np.abs(weight) > threshold)


def test_published_densities_of_lenet_300_100() -> None:
    kept = {"fc1/kernel": 0.08, "fc2/kernel": 0.09, "fc3/kernel": 0.26}
    masks = Han(sparsity={path: 1 - part for path, part in kept.items()}).masks(lenet_300_100())

    assert masks.count == 784 * 300 + 300 * 100 + 100 * 10 == 266_200
    assert masks.kept == 235_200 * 8 // 100 + 30_000 * 9 // 100 + 1000 * 26 // 100 == 21_776


def test_published_densities_of_lenet_5() -> None:
    kept = {"conv1/kernel": 0.66, "conv2/kernel": 0.12, "fc1/kernel": 0.08, "fc2/kernel": 0.19}
    masks = Han(sparsity={path: 1 - part for path, part in kept.items()}).masks(lenet_5())
    sizes = (20 * 1 * 5 * 5, 50 * 20 * 5 * 5, 4 * 4 * 50 * 500, 500 * 10)

    assert masks.count == sum(sizes) == 430_500
    assert masks.kept == 330 + 3000 + 32_000 + 950 == 36_280


def test_later_rounds_measure_what_is_left() -> None:
    model = mlp(widths=(40, 30))
    method = Han(quality=[0.5, 0.9])
    first = method.masks(model, 0)

    second = first & method.masks(model, 1, first)

    for path, variable in prunable_weights(model).items():
        weight = np.asarray(variable).astype(np.float64)
        threshold = 0.9 * np.std(weight[first[path]])
        expected = first[path] & (np.abs(weight) > threshold)
        np.testing.assert_array_equal(second[path], expected)
    assert second.kept < first.kept


def test_sparsity_in_rounds_is_of_all_weights() -> None:
    model = mlp(widths=(40, 30))
    method = Han(sparsity=[0.5, 0.75])
    first = method.masks(model, 0)
    second = method.masks(model, 1, first)

    assert first["fc2/kernel"].sum() == 40 * 30 // 2
    assert second["fc2/kernel"].sum() == 40 * 30 // 4
    assert second & first == second


def test_a_round_cannot_give_weights_back() -> None:
    model = mlp(widths=(40, 30))
    method = Han(sparsity=[0.75, 0.5])

    with pytest.raises(ArgumentError, match=r"at least 0\.75 for 'fc1/kernel'.*Received: 0\.5"):
        method.masks(model, 1, method.masks(model, 0))


def test_weights_without_a_pattern_are_left_as_they_are() -> None:
    model = lenet_5()
    method = Han(quality=[{"conv*": 0.5}, {"fc*": 0.5}])
    convolutions = method.masks(model, 0)
    both = method.masks(model, 1, convolutions)

    assert [path for path, s in convolutions.sparsities.items() if s] == [
        "conv1/kernel",
        "conv2/kernel",
    ]
    assert all(both.sparsities.values())
    np.testing.assert_array_equal(both["conv2/kernel"], convolutions["conv2/kernel"])


def test_preparing_masks_a_copy_with_the_first_round() -> None:
    model = mlp(widths=(40, 30))
    before = snapshot(model)
    method = Han(quality=[0.5, 0.9])

    prepared = method.prepare(model)

    assert same(before, model)
    assert masks_of(prepared) == method.masks(model, 0)
    # What stays keeps its value.
    assert Masks.of_zeros(prepared) == masks_of(prepared)
    for path, variable in prunable_weights(prepared).items():
        original = np.asarray(prunable_weights(model)[path])
        np.testing.assert_array_equal(
            np.asarray(variable), np.where(masks_of(prepared)[path], original, 0)
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either quality or sparsity"),
        ({"quality": 1.0, "sparsity": 0.5}, "either quality or sparsity"),
        ({"quality": -1.0}, "number from 0"),
        ({"quality": {"*": float("nan")}}, "number from 0"),
        ({"quality": []}, "at least one round"),
        ({"sparsity": [0.5, 1.0]}, "less than 1"),
        ({"quality": 1.0, "epochs_per_round": 0}, "epochs_per_round"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        Han(**arguments)


def test_a_threshold_beyond_all_weights_is_refused() -> None:
    with pytest.raises(ArgumentError, match="nothing of 'fc1/kernel'"):
        Han(quality={"fc1/*": 100.0}).masks(mlp())


def test_dropout_follows_the_connections() -> None:
    # D_o sqrt(C_ir / C_io)
    assert corrected_dropout(0.5, 100, 100) == 0.5
    assert corrected_dropout(0.5, 100, 25) == 0.25
    # fc1 of LeNet-300-100 with 8 % left
    assert corrected_dropout(0.5, 235_200, 18_816) == pytest.approx(0.5 * math.sqrt(0.08))
    for arguments in ((1.0, 2, 1), (0.5, 1, 2), (0.5, 0, 0), (0.5, 2, -1)):
        with pytest.raises(ArgumentError):
            corrected_dropout(*arguments)
