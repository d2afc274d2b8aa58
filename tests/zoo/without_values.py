"""Networks of which nothing but the shapes is wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras


@contextmanager
def without_values(build: Callable[[], Any]) -> Iterator[Any]:
    """A model whose variables have shapes and no values: hundreds of megabytes less to fill.

    Keras remembers such variables and would fill them at the next chance, so what it remembers is
    dropped with the model.
    """
    with keras.StatelessScope(initialize_variables=False):
        model = build()
    try:
        yield model
    finally:
        keras.backend.clear_session(free_memory=False)
