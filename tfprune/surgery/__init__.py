"""Removes channels for real: rebuilding, slicing, and the oracle that proves it."""

from tfprune.surgery.rebuild import apply
from tfprune.surgery.verify import Verification, check_finite, verify

__all__ = ["Verification", "apply", "check_finite", "verify"]
