"""What is done to a network around pruning: fine-tuning and batch-normalisation statistics."""

from tfprune.protocols.batch_norm import recalibrate_batch_norm
from tfprune.protocols.fine_tuning import fine_tune
from tfprune.protocols.record import FineTuneRecord

__all__ = ["FineTuneRecord", "fine_tune", "recalibrate_batch_norm"]
