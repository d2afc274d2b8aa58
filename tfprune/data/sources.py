"""The raw data: the digits of scikit-learn, and TFDS."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from tfprune.data.splits import Array, stratified
from tfprune.errors import DataError

DIGITS_TEST = 360
"""Test digits: a fifth of the 1797."""


def digits() -> tuple[tuple[Array, Array], tuple[Array, Array], str]:
    """The handwritten digits that scikit-learn carries, with a fixed test set.

    Returns:
        (images, labels) to train on, (images, labels) to test on, and the source. Images are
        uint8 in 0..16, ``(examples, 8, 8, 1)``; labels int32.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    labels = labels.astype(np.int32)
    # The test set must be one and the same for everybody, whatever seed they choose.
    test = stratified(labels, DIGITS_TEST, np.random.default_rng(1797))
    rest = np.setdiff1d(np.arange(len(labels)), test)
    source = (
        "scikit-learn's handwritten digits: the 1797 test images of the UCI set 'Optical "
        "Recognition of Handwritten Digits' (Alpaydin, Kaynak 1998); 360 held out for testing by "
        "tfprune, by a fixed draw"
    )
    return (images[rest], labels[rest]), (images[test], labels[test]), source


def builder(name: str, data_dir: str | None, download: bool) -> Any:
    """A TFDS builder whose data are on disk.

    Raises:
        DataError: TFDS is not installed, or the data are not there and could not be had.
    """
    tfds = _tfds()
    made = tfds.builder(name, data_dir=data_dir)
    if made.is_prepared():
        return made
    root = os.path.expanduser(data_dir or str(made.data_dir_root))
    wanted = (
        f"The data set {name!r} is not prepared in {root} (choose another place with data_dir, or "
        "with the environment variable TFDS_DATA_DIR)"
    )
    if not download:
        raise DataError(f"{wanted}, and download=False forbids fetching it.")
    # A download directory for each set: TFDS finds downloads by file name, and MNIST and
    # Fashion-MNIST have the same ones, so that a shared directory yields one for the other.
    directory = os.path.join(root, "downloads", name.replace("/", "_"))
    try:
        made.download_and_prepare(download_dir=directory)
    # Anything may go wrong: network, disk, checksums, a licence to accept.
    except Exception as error:
        raise DataError(
            f"{wanted}, and could not be downloaded: {type(error).__name__}: {error}"
        ) from error
    return made


def arrays(made: Any, split: str) -> tuple[Array, Array]:
    """A whole split in memory: uint8 images and int32 labels, in the order of the files."""
    tfds = _tfds()
    # Files read in parallel would come in any order, and every split is drawn by position.
    config = tfds.ReadConfig(interleave_cycle_length=1)
    dataset = made.as_dataset(split=split, batch_size=-1, shuffle_files=False, read_config=config)
    part = tfds.as_numpy(dataset)
    return np.asarray(part["image"]), np.asarray(part["label"], np.int32)


def describe(made: Any) -> str:
    """The source of a TFDS set."""
    return (
        f"tensorflow_datasets {made.info.full_name}, as prepared on this disk (a copy that was "
        "made from other files than the official ones goes by the same name)"
    )


def _tfds() -> Any:
    try:
        import importlib_resources  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        # importlib_resources is needed by TFDS at run time, and not declared by it.
        raise DataError(
            f"This data set is read by TFDS, and the package {error.name!r} is missing. "
            "Install it with: pip install 'tfprune[datasets]'. Or use the embedded 'digits'."
        ) from error
    return tfds
