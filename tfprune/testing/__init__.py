"""For people who add a rule, a criterion or a layer: model strategies, plans and contracts.

Needs ``hypothesis`` for the strategies (``pip install 'tfprune[test]'``).
"""

from tfprune.testing.contracts import check_criterion, check_surgery
from tfprune.testing.models import random_plan, randomize

__all__ = ["check_criterion", "check_surgery", "random_plan", "randomize"]
