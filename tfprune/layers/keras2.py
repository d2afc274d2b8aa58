"""Schedules of tfprune in files of tf_keras (Keras 2), which tfmot's wrapper writes and reads."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from tfprune.schedules import PruningSchedule, Schedule, deserialize, serialize
from tfprune.schedules.tfmot import load


class Keras2Schedule(PruningSchedule):  # type: ignore[misc]
    """A schedule whose ``get_config()`` is nested, as tfmot's wrapper expects it.

    Args:
        schedule: the schedule that it stands for.
    """

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule

    def __call__(self, step: Any) -> tuple[Any, Any]:
        """What the schedule says."""
        should_prune, sparsity = self.schedule(step)
        return should_prune, sparsity

    def get_config(self) -> dict[str, Any]:
        """The name of this class, and the serialized schedule."""
        return {"class_name": type(self).__name__, "config": serialize(self.schedule)}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Keras2Schedule:
        """From the inner half of :meth:`get_config`."""
        return cls(deserialize(config))


def for_keras2(schedule: Any) -> Any:
    """The schedule as tfmot's wrapper can save it; tfmot's own stay as they are."""
    return Keras2Schedule(schedule) if isinstance(schedule, Schedule) else schedule


def keras2_scope() -> contextlib.AbstractContextManager[Any]:
    """A scope in which tf_keras knows :class:`Keras2Schedule`."""
    load()  # tf_keras comes with it
    import tf_keras

    scope: contextlib.AbstractContextManager[Any] = tf_keras.saving.custom_object_scope(
        {Keras2Schedule.__name__: Keras2Schedule}
    )
    return scope
