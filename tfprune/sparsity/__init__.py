"""tfmot's module path, for code that was written for it: ``import tfprune as tfmot``."""

from __future__ import annotations

from tfprune.sparsity import keras

__all__ = ["keras"]
