"""Masks are values: checked, copied, counted, combined, saved."""

from __future__ import annotations

import os

import keras
import numpy as np
import pytest

from tests.toys import chain, images, residual
from tfprune.errors import ArgumentError, FileError, ModelError
from tfprune.layers import Masks, prunable_weights, with_masks


def _half(model, seed=0):
    random = np.random.default_rng(seed)
    return Masks(
        {path: random.random(tuple(v.shape)) < 0.5 for path, v in prunable_weights(model).items()}
    )


def test_counts_are_those_of_the_elements() -> None:
    masks = Masks({"a/kernel": [[1, 0], [1, 1]], "b/kernel": np.zeros(4, bool)})

    assert (masks.count, masks.kept) == (8, 3)
    assert masks.sparsity == 5 / 8
    assert masks.sparsities == {"a/kernel": 1 / 4, "b/kernel": 1.0}
    assert masks.empty == ["b/kernel"]
    assert list(masks) == ["a/kernel", "b/kernel"]
    assert "3 of 8" in repr(masks)


def test_no_masks_have_sparsity_zero() -> None:
    assert Masks({}).sparsity == 0


def test_it_keeps_copies_that_nobody_can_write() -> None:
    given = np.ones((2, 2), bool)
    masks = Masks({"a/kernel": given})
    given[0, 0] = False

    assert masks["a/kernel"].all()
    with pytest.raises(ValueError, match="read-only"):
        masks["a/kernel"][0, 0] = False
    with pytest.raises(TypeError):
        masks.arrays["a/kernel"] = given  # type: ignore[index]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([np.ones(2)], "mapping from the path"),
        ({"a/kernel": np.array([0.5, 1.0])}, "'a/kernel' .*other values"),
        ({"a/kernel": np.array(["yes"])}, "array of <U3"),
        ({3: np.ones(2)}, "Received: 3"),
    ],
)
def test_other_things_are_no_masks(arrays, message) -> None:
    with pytest.raises(ArgumentError, match=message):
        Masks(arrays)


def test_equality_is_of_the_elements() -> None:
    one, same = Masks({"a": [1, 0]}), Masks({"a": np.array([True, False])})

    assert one == same
    assert one != Masks({"a": [1, 1]})
    assert one != Masks({"b": [1, 0]})
    assert one != {"a": [1, 0]}


def test_and_keeps_what_both_keep() -> None:
    both = Masks({"a": [1, 1, 0, 0]}) & Masks({"a": [1, 0, 1, 0]})

    np.testing.assert_array_equal(both["a"], [True, False, False, False])


def test_and_of_other_weights_is_refused() -> None:
    with pytest.raises(ArgumentError, match="does not fit, of shape"):
        Masks({"a": [1, 1]}) & Masks({"a": [1, 1, 1]})
    with pytest.raises(ArgumentError, match="'b' besides"):
        Masks({"a": [1]}) & Masks({"a": [1], "b": [1]})


def test_masks_of_a_model_fit_it() -> None:
    model = residual()
    masks = Masks.ones(model)

    masks.check(model)
    assert masks.sparsity == 0
    # The depthwise kernel, biases and normalisation are not among them.
    assert list(masks) == [
        f"{name}/kernel" for name in ("stem", "expand", "squeeze", "excite", "project", "head")
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda arrays: arrays | {"conv0/kernel": np.ones((3, 3, 3, 9), bool)},
            r"shape \(3, 3, 3, 8\) for the weight 'conv0/kernel'.*shape \(3, 3, 3, 9\)",
        ),
        (lambda arrays: arrays | {"conv9/kernel": np.ones(3, bool)}, "'conv9/kernel' besides"),
        (
            lambda arrays: {k: v for k, v in arrays.items() if k != "head/kernel"},
            "none for 'head/kernel'",
        ),
    ],
)
def test_masks_that_do_not_fit_are_refused_by_name(change, message) -> None:
    model = chain()
    masks = Masks(change(dict(Masks.ones(model))))

    with pytest.raises(ArgumentError, match=message):
        masks.check(model)


def test_over_fills_in_ones() -> None:
    model = chain()
    zeros = np.zeros((3, 3, 3, 8), bool)
    masks = Masks.over(model, {"conv0/kernel": zeros})

    masks.check(model)
    assert masks.empty == ["conv0/kernel"]
    assert masks.kept == Masks.ones(model).count - zeros.size
    with pytest.raises(ArgumentError, match="'nothing/kernel' besides"):
        Masks.over(model, {"nothing/kernel": zeros})


def test_apply_is_pure_and_of_zeros_reads_it_back() -> None:
    model = chain()
    before = [value.copy() for value in model.get_weights()]
    masks = _half(model)

    sparse = masks.apply(model)

    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert Masks.of_zeros(sparse) == masks
    assert [type(layer) for layer in sparse.layers] == [type(layer) for layer in model.layers]
    for path, weight in prunable_weights(sparse).items():
        original = np.asarray(prunable_weights(model)[path])
        np.testing.assert_array_equal(np.asarray(weight), np.where(masks[path], original, 0))


def test_apply_takes_a_wrapped_model() -> None:
    model = chain()
    first, second = _half(model, 0), _half(model, 1)

    sparse = second.apply(with_masks(model, first))

    assert Masks.of_zeros(sparse) == first & second
    assert sparse.count_params() == model.count_params()


def test_zero_works_in_place_and_on_not_a_number() -> None:
    model = chain()
    kernel = prunable_weights(model)["head/kernel"]
    kernel.assign(np.full(tuple(kernel.shape), np.nan, "float32"))
    masks = Masks.over(model, {"head/kernel": np.zeros(tuple(kernel.shape), bool)})

    masks.zero(model)

    assert not np.asarray(kernel).any()
    assert model(images()).shape == (12, 5)


def test_nested_models_have_paths_through_their_parts() -> None:
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="dense")], name="block")
    model = keras.Sequential([keras.Input((4,)), inner, keras.layers.Dense(2, name="head")])
    masks = _half(model)

    assert list(masks) == ["block/dense/kernel", "head/kernel"]
    assert Masks.of_zeros(masks.apply(model)) == masks


def test_a_tf_keras_model_is_sent_to_tfmot() -> None:
    import tf_keras

    model = tf_keras.Sequential([tf_keras.layers.Dense(2, input_shape=(3,))])

    with pytest.raises(ModelError, match="tensorflow_model_optimization"):
        Masks.ones(model)


def test_a_file_holds_the_same_masks(tmp_path) -> None:
    masks = _half(residual())
    # What savez would take for its own argument is a path like any other.
    masks = Masks({**masks, "file": [1, 0], "a/b c:d": np.ones((0, 3), bool)})
    path = tmp_path / "masks.npz"

    masks.save(path)
    again = Masks.load(path)

    assert again == masks
    assert list(again) == list(masks)
    assert os.listdir(tmp_path) == ["masks.npz"]


def test_a_failing_save_leaves_the_former_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "masks.npz"
    Masks({"a": [1, 0]}).save(path)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(FileError, match="No space left"):
        Masks({"a": [1, 1]}).save(path)
    monkeypatch.undo()

    assert Masks.load(path) == Masks({"a": [1, 0]})
    assert os.listdir(tmp_path) == ["masks.npz"]


def test_other_files_are_refused(tmp_path) -> None:
    whole = tmp_path / "whole.npz"
    Masks({"a": np.ones(5000, bool)}).save(whole)
    content = whole.read_bytes()
    cases = {
        "cut.npz": content[: len(content) // 2],
        "text.npz": b"not an archive",
        "empty.npz": b"",
        "flipped.npz": content.replace(b"PK", b"PX"),
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
    np.save(tmp_path / "array.npy", np.ones(3))
    np.savez(tmp_path / "other.npz", weights=np.ones(3))
    np.savez(tmp_path / "newer.npz", format=np.array("tfprune masks 2"))
    np.savez(tmp_path / "pickle.npz", format=np.array("tfprune masks 1"), **{
        "mask:a": np.array([print], dtype=object)
    })  # fmt: skip
    names = [*cases, "array.npy", "other.npz", "newer.npz", "pickle.npz", "absent.npz"]

    for name in names:
        with pytest.raises(ArgumentError, match=r"Masks\.save"):
            Masks.load(tmp_path / name)
