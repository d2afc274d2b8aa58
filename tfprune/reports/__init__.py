"""Tables, figures and comparisons."""

from tfprune.reports.comparison import Comparison, Row, compare
from tfprune.reports.tables import cost_table, graph_table, plan_table

__all__ = ["Comparison", "Row", "compare", "cost_table", "graph_table", "plan_table"]
