"""A classifier of the digits, and its test set."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """``model``, ``x`` and ``y`` (360 test digits), ``accuracy`` by Keras, ``file`` (float32)."""
    import keras

    import tfprune
    from tests.cli.conftest import network

    splits = tfprune.data.load("digits", batch_size=32)
    model = network(keras)
    tfprune.fine_tune(model, splits.train_epoch, epochs=4, learning_rate=0.05, verbose=0)
    batches = [(x.numpy(), y.numpy()) for x, y in splits.test]
    x = np.concatenate([batch for batch, _ in batches])
    y = np.concatenate([batch for _, batch in batches])
    accuracy = float((model.predict(x, verbose=0).argmax(-1) == y).mean())
    file = tmp_path_factory.mktemp("lite") / "digits.tflite"
    tfprune.export(model, file)
    return SimpleNamespace(model=model, x=x, y=y, accuracy=accuracy, file=file, splits=splits)
