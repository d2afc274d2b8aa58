"""Settings for all tests."""

import os

# Before TensorFlow is imported: its start-up messages bury what a failing test prints.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Without oneDNN TensorFlow has no channels-first convolutions on a CPU, and it uses oneDNN by
# itself on some processors only.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
