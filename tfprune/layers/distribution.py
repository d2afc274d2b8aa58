"""Distribution strategies: where variables of a model may be assigned."""

from __future__ import annotations

import contextlib
from typing import Any


def strategy_scope(model: Any) -> contextlib.AbstractContextManager[Any]:
    """The scope of the strategy that a model was made under; an empty one if there is none."""
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()
