"""Exact counts, ties by position."""

from __future__ import annotations

import numpy as np
import pytest

from tfprune.errors import ArgumentError, ModelError
from tfprune.layers import Masks
from tfprune.methods.ranking import (
    check_sparsity,
    kept_count,
    largest,
    match,
    require_no_empty,
)


@pytest.mark.parametrize(
    ("total", "sparsity", "kept"),
    [
        (266_200, 0.95, 13_310),
        (1000, 0.0, 1000),
        (10, 0.25, 8),  # 7.5, halves to even
        (10, 0.35, 6),  # 6.5
        (3, 0.5, 2),  # 1.5
    ],
)
def test_kept_count(total, sparsity, kept) -> None:
    assert kept_count(total, sparsity) == kept


def test_keeping_nothing_is_refused_with_the_most_that_can_go() -> None:
    with pytest.raises(ArgumentError, match=r"at most 0\.9\. Received: 0\.99"):
        kept_count(10, 0.99)


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, float("nan"), float("inf"), True, "0.5", None])
def test_sparsities_out_of_range(value) -> None:
    with pytest.raises(ArgumentError, match="from 0 to less than 1"):
        check_sparsity(value)


def test_the_largest_of_all_layers_together_stay() -> None:
    kept = largest({"a": np.array([[5.0, 1.0]]), "b": np.array([4.0, 2.0, 3.0])}, 3)

    np.testing.assert_array_equal(kept["a"], [[True, False]])
    np.testing.assert_array_equal(kept["b"], [True, False, True])


@pytest.mark.parametrize("kept", range(8))
def test_ties_are_broken_by_position(kept) -> None:
    scores = {"a": np.array([1.0, 2.0, 1.0]), "b": np.array([[1.0, 2.0], [1.0, 1.0]])}
    # Both twos first, then the ones from the front.
    order = [1, 4, 0, 2, 3, 5, 6]
    expected = np.zeros(7, bool)
    expected[order[:kept]] = True

    masks = largest(scores, kept)

    np.testing.assert_array_equal(np.concatenate([m.ravel() for m in masks.values()]), expected)
    assert masks["b"].shape == (2, 2)


def test_it_equals_a_stable_sort() -> None:
    random = np.random.default_rng(0)
    scores = {"a": random.integers(0, 5, (7, 3)).astype(float), "b": random.random(11)}
    flat = np.concatenate([s.ravel() for s in scores.values()])
    for kept in range(flat.size + 1):
        expected = np.zeros(flat.size, bool)
        expected[np.argsort(-flat, kind="stable")[:kept]] = True
        masks = largest(scores, kept)
        np.testing.assert_array_equal(np.concatenate([m.ravel() for m in masks.values()]), expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(bad) -> None:
    with pytest.raises(ModelError, match="NaN or infinity for 'b'"):
        largest({"a": np.ones(2), "b": np.array([bad, 1.0])}, 1)


def test_what_is_gone_is_not_kept_before_what_is_left() -> None:
    kept = largest({"a": np.array([-np.inf, 0.0, -np.inf, 0.0])}, 2)

    np.testing.assert_array_equal(kept["a"], [False, True, False, True])


def test_an_empty_layer_is_refused_by_name_or_allowed() -> None:
    masks = Masks({"a/kernel": [0, 0], "b/kernel": [1, 0]})

    with pytest.raises(ArgumentError, match=r"nothing of 'a/kernel'.*allow_empty_layers=True"):
        require_no_empty(masks, allowed=False)
    assert require_no_empty(masks, allowed=True) is masks


def test_patterns() -> None:
    paths = ["conv0/kernel", "conv1/kernel", "block/conv1/kernel", "head/kernel"]

    assert match({"conv*": 1, "conv1/kernel": 2, "*conv1/*": 3}, paths) == {
        "conv0/kernel": 1,
        "conv1/kernel": 2,
        "block/conv1/kernel": 3,
    }
    with pytest.raises(ArgumentError, match="'dense/kernel', which fits none"):
        match({"*": 1, "dense/kernel": 2}, paths)
