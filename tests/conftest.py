"""Settings for all tests."""

import gc
import os

# Before TensorFlow is imported: its start-up messages bury what a failing test prints.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# Without oneDNN TensorFlow has no channels-first convolutions on a CPU, and it uses oneDNN by
# itself on some processors only.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

# A worker has a core to itself: more threads would wait for those of the other workers.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def pytest_collection_finish() -> None:
    """Spares the collector what has been imported by now, and lets it look less often.

    It took a twelfth of the time of some folders, nearly all of it for objects that live on.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(2000, 10, 10)
