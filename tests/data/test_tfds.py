"""Sets that TFDS keeps: small ones in its format, written here; nothing is downloaded."""

import builtins
import os

import numpy as np
import pytest
import tensorflow as tf

from tfprune import data
from tfprune.data import sources
from tfprune.errors import ArgumentError, DataError

tfds = pytest.importorskip("tensorflow_datasets")


def collect(dataset):
    batches = [(x.numpy(), y.numpy()) for x, y in dataset]
    return np.concatenate([x for x, _ in batches]), np.concatenate([y for _, y in batches])


def write(directory, name: str, shape, counts: dict[str, int]) -> None:
    """A data set of TFDS's name, version and features, with random images."""
    official = tfds.builder(name, data_dir=str(directory))
    features, config = official.info.features, official.builder_config
    generator = np.random.default_rng(0)
    sets = {}
    for split, count in counts.items():
        examples = {
            "image": generator.integers(0, 256, (count, *shape), dtype=np.uint8),
            "label": np.arange(count, dtype=np.int64) % 10,
        }
        if "id" in features:
            examples["id"] = np.array([f"{split}_{number}" for number in range(count)])
        sets[split] = tf.data.Dataset.from_tensor_slices(examples)
    tfds.dataset_builders.TfDataBuilder(
        name=official.name,
        version=str(official.version),
        config=None if config is None else config.name,
        data_dir=str(directory),
        split_datasets=sets,
        features=features,
    ).download_and_prepare()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    write(directory, "cifar10", (32, 32, 3), {"train": 200, "test": 40})
    write(directory, "mnist", (28, 28, 1), {"train": 60, "test": 20})
    write(directory, "imagenette/320px-v2", (40, 60, 3), {"train": 50, "validation": 12})
    return str(directory)


def test_cifar_with_the_papers_constants(store) -> None:
    splits = data.load("cifar10", batch_size=32, data_dir=store, download=False)
    assert splits.info.counts == {"train": 180, "validation": 20, "test": 40}
    assert "cifar10" in splits.info.source
    images, labels = collect(splits.train)
    assert images.shape == (180, 32, 32, 3) and images.dtype == np.float32
    assert np.bincount(labels).tolist() == [18] * 10
    raw = collect(data.load("cifar10", data_dir=store, normalization="unit").test)[0]
    mean, std = np.float32([0.4914, 0.4822, 0.4465]), np.float32([0.2023, 0.1994, 0.2010])
    # One subtraction and one division in float32, of numbers up to 2.5.
    np.testing.assert_allclose(collect(splits.test)[0], (raw - mean) / std, rtol=1e-5, atol=1e-6)
    assert raw.min() == 0 and raw.max() == 1


def test_the_constants_of_imagenet_can_be_chosen(store) -> None:
    splits = data.load("cifar10", data_dir=store, normalization="imagenet")
    assert splits.info.mean == (0.485, 0.456, 0.406)
    unit = data.load("cifar10", data_dir=store, normalization="unit")
    assert collect(splits.test)[0].min() == pytest.approx(-0.485 / 0.229, rel=1e-5)
    assert np.array_equal(collect(unit.test)[1], collect(splits.test)[1])


def test_augmented_cifar_pads_with_black(store) -> None:
    splits = data.load("cifar10", data_dir=store, augment=True)
    images = collect(splits.train_epoch(0))[0]
    black = (0 - np.float32(splits.info.mean)) / np.float32(splits.info.std)
    rows = np.isclose(images, black, atol=1e-6).all(axis=(2, 3))
    # A vertical shift of n pixels leaves n black rows; random images have none by themselves.
    assert set(rows.sum(axis=1)) == {0, 1, 2, 3, 4}


def test_loading_twice_gives_the_same_division(store) -> None:
    first, second = (data.load("mnist", data_dir=store, seed=1) for _ in range(2))
    assert np.array_equal(collect(first.validation)[0], collect(second.validation)[0])
    assert np.array_equal(collect(first.train_epoch(0))[0], collect(second.train_epoch(0))[0])


@pytest.mark.parametrize("augment", [False, True])
def test_large_sets_are_streamed_and_resized(store, augment: bool) -> None:
    splits = data.load("imagenette", data_dir=store, image_size=32, batch_size=8, augment=augment)
    assert splits.info.counts == {"train": 45, "validation": 5, "test": 12}
    for name, count in splits.info.counts.items():
        images, labels = collect(getattr(splits, name))
        assert images.shape == (count, 32, 32, 3) and labels.dtype == np.int32
    first, second = collect(splits.train_epoch(3)), collect(splits.train_epoch(3))
    assert np.array_equal(first[0], second[0])
    assert not np.array_equal(first[1], collect(splits.train_epoch(4))[1])
    # Training and validation images are other ones: their labels together are those of the file.
    together = np.concatenate([first[1], collect(splits.validation)[1]])
    assert np.bincount(together).tolist() == [5] * 10


def test_a_subset_of_a_stream(store) -> None:
    splits = data.load("imagenette", data_dir=store, image_size=32, subset=20)
    assert splits.info.counts == {"train": 18, "validation": 2, "test": 12}
    assert len(collect(splits.train)[1]) == 18
    with pytest.raises(DataError, match=r"51 examples.*there are 50"):
        data.load("imagenette", data_dir=store, subset=51)


def test_the_centre_is_cut_out() -> None:
    from tfprune.data.streams import centre

    image = np.zeros((64, 128, 3), np.uint8)
    image[:, 32:96] = 255
    cut = centre(tf.constant(image), 56).numpy()
    # The short side becomes 64, so nothing is resized: a cut of 56 from the white middle.
    assert cut.shape == (56, 56, 3) and cut.min() == 255


def test_missing_data_name_the_place_and_the_way_out(tmp_path) -> None:
    with pytest.raises(
        DataError, match=r"'mnist' is not prepared in .*TFDS_DATA_DIR.*download=False"
    ):
        data.load("mnist", data_dir=str(tmp_path), download=False)


def test_a_failed_download_says_so_and_downloads_are_kept_apart(tmp_path, monkeypatch) -> None:
    asked = []

    def fail(self, *, download_dir):
        asked.append(download_dir)
        raise ConnectionError("no route")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    for name in ("mnist", "fashion_mnist"):
        with pytest.raises(DataError, match="could not be downloaded: ConnectionError: no route"):
            data.load(name, data_dir=str(tmp_path))
    # Their files have the same names, and TFDS finds downloads by name.
    assert asked == [
        str(tmp_path / "downloads" / "mnist"),
        str(tmp_path / "downloads" / "fashion_mnist"),
    ]


@pytest.mark.parametrize("missing", ["tensorflow_datasets", "importlib_resources"])
def test_a_missing_package_names_the_extra(missing: str, monkeypatch) -> None:
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=rf"{missing}.*pip install 'tfprune\[datasets\]'.*digits"):
        data.load("cifar10")


def test_only_the_sets_of_imagenet_have_a_size(store) -> None:
    with pytest.raises(ArgumentError, match="image_size"):
        data.load("cifar10", image_size=16)


def test_reading_leaves_the_environment_alone(store) -> None:
    before = dict(os.environ)
    made = sources.builder("mnist", store, download=False)
    images, labels = sources.arrays(made, "train")
    assert images.dtype == np.uint8 and labels.dtype == np.int32 and len(images) == 60
    assert dict(os.environ) == before
