"""Keeps TensorFlow's start-up messages off the terminal of a command-line run."""

from __future__ import annotations

import os
import sys


def quiet_tensorflow() -> None:
    """Imports TensorFlow and Keras with standard error shut for as long as that takes.

    The messages come from C++ before any logger can be asked to be silent. Only for a process
    that is the program's own: the library itself leaves the user's process alone.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stderr.flush()
    saved = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        import tensorflow as tf

        tf.constant(0)  # starts the devices, which talk as well
        import keras  # noqa: F401
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
