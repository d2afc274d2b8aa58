"""Settings for all tests."""

import os

# Before TensorFlow is imported: its start-up messages bury what a failing test prints.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
