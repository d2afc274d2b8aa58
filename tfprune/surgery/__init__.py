"""Removes channels for real: rebuilding, slicing, and the oracle that proves it."""

from tfprune.surgery.constants import Absorption, absorbed
from tfprune.surgery.merging import merged
from tfprune.surgery.rebuild import apply
from tfprune.surgery.resize import resize
from tfprune.surgery.verify import Verification, check_finite, verify
from tfprune.surgery.zero_channels import EmptyChannels, empty_channels, remove_zero_channels

__all__ = [
    "Absorption",
    "EmptyChannels",
    "Verification",
    "absorbed",
    "apply",
    "check_finite",
    "empty_channels",
    "merged",
    "remove_zero_channels",
    "resize",
    "verify",
]
