"""Data sets by name, ready to train on: a training, a validation and a test set.

The only place that imports TFDS, and only when a set that needs it is asked for. The digits need
nothing but scikit-learn.
"""

from tfprune.data.loading import load
from tfprune.data.recipes import NAMES, Normalization
from tfprune.data.splits import DataInfo, Splits

__all__ = ["NAMES", "DataInfo", "Normalization", "Splits", "load"]
