"""Parameters, MACs and bytes: the one count of the project."""

from tfprune.cost.liu import liu_flops
from tfprune.cost.model import Cost, CostModel, LayerCost, measure

__all__ = ["Cost", "CostModel", "LayerCost", "liu_flops", "measure"]
