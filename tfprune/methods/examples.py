"""The labelled examples that some methods look at, besides those they train on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tfprune.batches import iterate
from tfprune.errors import DataError


def labelled(
    data: Any, model: Any, purpose: str, *, batch_size: int, batches: int | None
) -> Iterator[tuple[Any, Any]]:
    """Batches of inputs and labels.

    Args:
        data: a dataset of batches, or arrays.
        model: that they must fit.
        purpose: what they are for, for the message.
        batch_size: of the batches cut from arrays.
        batches: at most so many; all of them if ``None``.

    Raises:
        DataError: none, without labels, or of another shape than the model's inputs.
    """
    if data is None:
        raise DataError(f"Expected data to {purpose}. Received: none.")
    return iterate(
        data,
        batch_size=batch_size,
        limit=batches,
        labels=True,
        input_shape=getattr(model, "input_shape", None),
    )
