"""TensorFlow Model Optimization (tfmot), imported without side effects.

tfmot was written for Keras 2. On import it sets ``TF_USE_LEGACY_KERAS`` in the environment, and
``tf.keras`` means tf_keras from then on, if nobody has used it before. :func:`load` keeps both as
the user had them. Only this package and ``tfprune.layers`` use tfmot.
"""

from __future__ import annotations

import importlib
import os
import sys
import threading
import warnings
from typing import Any

_NAME = "tensorflow_model_optimization"
_VARIABLE = "TF_USE_LEGACY_KERAS"
# The environment is the process's: a second thread must not take tfmot's value for the user's.
_lock = threading.Lock()


def load() -> Any:
    """The module ``tensorflow_model_optimization``.

    The first call takes about two seconds. ``tf.keras`` keeps the meaning that the user's settings
    give it (Keras 3 unless ``TF_USE_LEGACY_KERAS`` says otherwise), and the variable its value.

    Raises:
        ImportError: tfmot, or something that it needs, is not installed.
    """
    with _lock:
        if _NAME in sys.modules:
            return sys.modules[_NAME]
        import tensorflow as tf

        # tf.keras is bound on first use, and for good.
        _ = tf.keras.layers
        before = os.environ.get(_VARIABLE)
        try:
            with warnings.catch_warnings():
                # tfmot compares TensorFlow's version that way.
                warnings.filterwarnings(
                    "ignore",
                    message="distutils Version classes are deprecated",
                    category=DeprecationWarning,
                )
                return importlib.import_module(_NAME)
        except ImportError as error:
            raise ImportError(
                "Pruning schedules and wrappers build on tensorflow-model-optimization, which "
                f"cannot be imported: {error}. Install it with: pip install "
                "tensorflow-model-optimization tf_keras setuptools",
                name=error.name,
            ) from error
        finally:
            if before is None:
                os.environ.pop(_VARIABLE, None)
            else:
                os.environ[_VARIABLE] = before
