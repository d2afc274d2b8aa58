"""The label store: equalities, freezes and their closure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfprune.graph.labels import LabelStore, concatenate


def test_labels_are_all_different_and_never_zero() -> None:
    store = LabelStore()
    labels = np.concatenate([store.fresh(3), store.fresh(0), store.fresh(2)])
    assert len(set(labels.tolist())) == 5
    assert 0 not in labels


def test_equalities_are_closed() -> None:
    store = LabelStore()
    a, b, c = store.fresh(3), store.fresh(3), store.fresh(3)
    store.unite(a, b)
    store.unite(c, b[::-1])
    solution = store.solve()
    assert solution.channel_of[a].tolist() == solution.channel_of[c[::-1]].tolist()
    assert len(set(solution.channel_of[a].tolist())) == 3
    assert not solution.frozen[solution.channel_of[a]].any()


def test_a_freeze_reaches_everything_united_with_it_and_keeps_its_reason() -> None:
    store = LabelStore()
    a, b = store.fresh(3), store.fresh(3)
    store.freeze(a[1:2], "layer", "because")
    store.unite(a, b, "add")
    solution = store.solve()
    channels = solution.channel_of[b]
    assert solution.frozen[channels].tolist() == [False, True, False]
    assert str(solution.reasons[int(channels[1])][0]) == "because (layer)"


def test_label_zero_freezes_but_does_not_join_its_partners() -> None:
    store = LabelStore()
    a, b = store.fresh(2), store.fresh(2)
    zeros = np.zeros(1, np.int64)
    store.unite(a, np.concatenate([zeros, b[1:]]))
    store.unite(np.concatenate([zeros, zeros]), np.concatenate([b[:1], zeros]))
    solution = store.solve()
    first, second = solution.channel_of[[a[0], b[0]]]
    assert first != second
    assert 0 not in (first, second)
    assert solution.frozen[[first, second]].all()
    assert not solution.frozen[solution.channel_of[a[1]]]


def test_arrays_of_different_lengths_are_refused() -> None:
    store = LabelStore()
    with pytest.raises(ValueError, match=r"one length at 'here'. Received: 2 and 3"):
        store.unite(store.fresh(2), store.fresh(3), "here")


def test_a_label_may_stand_twice() -> None:
    store = LabelStore()
    a, b = store.fresh(2), store.fresh(4)
    store.unite(np.tile(a, 2), b)
    channels = store.solve().channel_of
    assert channels[b[0]] == channels[b[2]] == channels[a[0]] != channels[a[1]]


@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=20))
def test_the_closure_equals_the_naive_one(pairs: list[tuple[int, int]]) -> None:
    store = LabelStore()
    store.fresh(12)
    classes = {label: {label} for label in range(1, 13)}
    for a, b in pairs:
        store.unite(np.array([a]), np.array([b]))
        merged = classes[a] | classes[b]
        for label in merged:
            classes[label] = merged
    channel_of = store.solve().channel_of
    for a in range(1, 13):
        same = {b for b in range(1, 13) if channel_of[b] == channel_of[a]}
        assert same == classes[a]
    # Numbered by the smallest label.
    firsts = [int(np.flatnonzero(channel_of == c)[0]) for c in range(int(channel_of.max()) + 1)]
    assert firsts == sorted(firsts)


def test_concatenation_fills_untracked_parts_with_label_zero() -> None:
    a = np.array([3, 4])
    joined = concatenate([None, a, None], [1, 2, 2])
    assert joined is not None
    assert joined.tolist() == [0, 3, 4, 0, 0]
    assert concatenate([None, None], [1, 2]) is None
