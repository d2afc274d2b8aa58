"""The embedded digits, and what holds for every loaded set: parts, order, augmentation."""

import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

from tfprune import data
from tfprune.data.pipeline import Preparation, shuffled
from tfprune.data.splits import stratified
from tfprune.errors import ArgumentError, DataError


def collect(dataset):
    batches = [(x.numpy(), y.numpy()) for x, y in dataset]
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])


def rows(images) -> list[bytes]:
    return sorted(image.tobytes() for image in images)


def test_the_parts_are_the_whole_and_share_nothing() -> None:
    splits = data.load("digits", validation=0.2)
    parts = {name: collect(getattr(splits, name)) for name in ("train", "validation", "test")}
    raw, labels = load_digits(return_X_y=True)
    whole = (raw.reshape(-1, 8, 8, 1) / 16).astype(np.float32)
    # No two of the 1797 images are equal, so their bytes tell them apart.
    assert len(set(rows(whole))) == 1797
    assert rows(np.concatenate([x for x, _ in parts.values()])) == rows(whole)
    of = {image.tobytes(): label for image, label in zip(whole, labels, strict=True)}
    for images, its in parts.values():
        assert [of[image.tobytes()] for image in images] == its.tolist()
    counts = {name: len(y) for name, (_, y) in parts.items()}
    assert counts == splits.info.counts == {"train": 1150, "validation": 287, "test": 360}
    assert splits.info.steps == {"train": 9, "validation": 3, "test": 3}
    assert len(splits.train) == 9
    for _, its in parts.values():
        shares = np.bincount(its) / len(its)
        # Class shares of the whole are 9.7 to 10.2 %; rounding moves a part by less than one
        # example, and the remainders left by two draws by less than three.
        assert np.abs(shares - np.bincount(labels) / 1797).max() < 3 / 287


def test_images_and_labels_have_the_promised_form() -> None:
    splits = data.load("digits", batch_size=50)
    for dataset in (splits.train, splits.validation, splits.test):
        x, y = next(iter(dataset))
        assert x.dtype == tf.float32 and y.dtype == tf.int32
        assert x.shape == (50, 8, 8, 1) and y.shape == (50,)
        assert x.numpy().min() >= 0 and x.numpy().max() == 1
    assert splits.info.input_shape == (8, 8, 1) and splits.info.classes == 10
    assert "scikit-learn" in splits.info.source


def test_the_test_set_does_not_depend_on_the_seed() -> None:
    first, second = (data.load("digits", seed=seed, validation=0.3) for seed in (0, 1))
    assert np.array_equal(collect(first.test)[0], collect(second.test)[0])
    assert rows(collect(first.validation)[0]) != rows(collect(second.validation)[0])


def test_the_seed_fixes_everything() -> None:
    first, second = (data.load("digits", seed=5, augment=True, subset=300) for _ in range(2))
    for name in ("train", "validation"):
        a, b = collect(getattr(first, name)), collect(getattr(second, name))
        assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])


def test_every_iteration_reshuffles_the_same_examples() -> None:
    splits = data.load("digits")
    (first, _), (second, _) = collect(splits.train), collect(splits.train)
    assert not np.array_equal(first, second)
    assert rows(first) == rows(second)


def test_epochs_are_reproducible_one_by_one() -> None:
    splits, again = (data.load("digits", augment=True) for _ in range(2))
    for _ in splits.train:
        pass
    first, same, other = splits.train_epoch(4), again.train_epoch(4), splits.train_epoch(5)
    assert np.array_equal(collect(first)[0], collect(same)[0])
    assert np.array_equal(collect(first)[0], collect(first)[0])
    assert not np.array_equal(collect(first)[1], collect(other)[1])
    plain = data.load("digits")
    assert rows(collect(plain.train_epoch(0))[0]) == rows(collect(plain.train)[0])
    with pytest.raises(ArgumentError, match="from 0; received -1"):
        splits.train_epoch(-1)


def test_a_subset_is_drawn_class_by_class_before_validation() -> None:
    splits = data.load("digits", subset=100, validation=0.25)
    assert splits.info.counts == {"train": 75, "validation": 25, "test": 360}
    labels = np.concatenate([collect(splits.train)[1], collect(splits.validation)[1]])
    assert set(np.bincount(labels)) <= {9, 10, 11}


def test_augmentation_shifts_training_images_only() -> None:
    plain, augmented = data.load("digits"), data.load("digits", augment=True)
    assert np.array_equal(collect(plain.validation)[0], collect(augmented.validation)[0])
    assert np.array_equal(collect(plain.test)[0], collect(augmented.test)[0])
    before, after = set(rows(collect(plain.train)[0])), rows(collect(augmented.train)[0])
    # One of nine shifts is none.
    assert len(after) == 1293 and 0.03 < np.mean([row in before for row in after]) < 0.25


def test_a_crop_is_a_shift_of_the_padded_image_and_a_flip_its_mirror() -> None:
    image = np.arange(1, 17, dtype=np.uint8).reshape(1, 4, 4, 1)
    padded = np.pad(image[0], [(1, 1), (1, 1), (0, 0)])
    shifts = {(y, x): padded[y : y + 4, x : x + 4] for y in range(3) for x in range(3)}
    possible = {part.tobytes(): (place, 0) for place, part in shifts.items()}
    possible |= {part[:, ::-1].tobytes(): (place, 1) for place, part in shifts.items()}
    preparation = Preparation(1.0, (0.0,), (1.0,), pad=1, flip=True)
    images, labels = np.repeat(image, 600, axis=0), np.zeros(600, np.int32)
    dataset, epoch = shuffled(images, labels, 64, preparation, seed=0)
    for source in (dataset, epoch(0)):
        drawn = [possible[x.astype(np.uint8).tobytes()] for x in collect(source)[0]]
        counts = [drawn.count(case) for case in possible.values()]
        # 18 cases, 33 expected of each with a deviation of 5.6: within five of them.
        assert min(counts) > 5 and max(counts) < 61


@pytest.mark.parametrize(
    ("normalization", "mean", "std"),
    [
        ("unit", (0.0,), (1.0,)),
        ("dataset", (0.0,), (1.0,)),
        (((0.5,), (0.25,)), (0.5,), (0.25,)),
    ],
)
def test_normalisation(normalization, mean, std) -> None:
    splits = data.load("digits", normalization=normalization)
    assert (splits.info.mean, splits.info.std) == (mean, std)
    raw = collect(data.load("digits", normalization="unit").test)[0]
    # One subtraction and one division in float32.
    np.testing.assert_allclose(
        collect(splits.test)[0], (raw - mean[0]) / std[0], rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size; received 0"),
        ({"validation": 0.0}, "between 0 and 1; received 0"),
        ({"validation": 1.0}, "between 0 and 1"),
        ({"subset": 1}, "at least 2"),
        ({"seed": -1}, "seed from 0"),
        ({"image_size": 32}, "image_size is for"),
        ({"normalization": "cifar"}, "'dataset', 'imagenet', 'unit'.*'cifar'"),
        ({"normalization": "imagenet"}, "1 channels"),
        ({"normalization": ((0.0,), (0.0,))}, "positive standard deviation"),
    ],
)
def test_bad_arguments_are_refused(options, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        data.load("digits", **options)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"'digits', 'mnist'.*received 'cifar'"):
        data.load("cifar")


def test_too_large_a_subset_is_refused() -> None:
    with pytest.raises(DataError, match=r"2000 examples.*there are 1437"):
        data.load("digits", subset=2000)


def test_stratified_draws_are_exact() -> None:
    labels = np.repeat([0, 1, 2], [1, 10, 89])
    for count in (1, 7, 50, 100):
        drawn = stratified(labels, count, np.random.default_rng(0))
        assert len(np.unique(drawn)) == count
        shares = np.bincount(labels[drawn], minlength=3) - count * np.array([0.01, 0.1, 0.89])
        assert np.abs(shares).max() < 1
