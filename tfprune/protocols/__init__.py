"""What is done to a network around pruning: fine-tuning, distillation, training from scratch."""

from tfprune.graph.fresh import reinitialise
from tfprune.protocols.batch_norm import recalibrate_batch_norm
from tfprune.protocols.distillation import Distillation
from tfprune.protocols.fine_tuning import fine_tune
from tfprune.protocols.iterative import IterativeRecord, Round, prune_iteratively
from tfprune.protocols.record import FineTuneRecord, ScratchRecord
from tfprune.protocols.scratch import scratch_b, scratch_b_epochs, scratch_e

__all__ = [
    "Distillation",
    "FineTuneRecord",
    "IterativeRecord",
    "Round",
    "ScratchRecord",
    "fine_tune",
    "prune_iteratively",
    "recalibrate_batch_norm",
    "reinitialise",
    "scratch_b",
    "scratch_b_epochs",
    "scratch_e",
]
