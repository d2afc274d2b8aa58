"""The channel graph: which channels of a model go together, which may go, and why not.

The core of tfprune. It knows nothing of criteria, budgets or slicing and imports nothing else of
the project.
"""

from tfprune.graph.context import RuleCall
from tfprune.graph.groups import ChannelGraph, ChannelGroup, Member, analyse
from tfprune.graph.labels import AxisLabels, Labels, TensorLabels
from tfprune.graph.rules import elementwise, rule

__all__ = [
    "AxisLabels",
    "ChannelGraph",
    "ChannelGroup",
    "Labels",
    "Member",
    "RuleCall",
    "TensorLabels",
    "analyse",
    "elementwise",
    "rule",
]
