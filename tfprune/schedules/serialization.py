"""Schedules as plain dictionaries, and back.

``{"class_name": name, "config": arguments}``, for the schedules of tfprune, of tfmot and the user's
own. A file that holds one is data: names are looked up among classes that are known already, and
nothing is imported because a file says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

from tfprune.errors import ArgumentError
from tfprune.schedules.tfmot import load

_sparsity = load().sparsity.keras
_OF_TFMOT = {c.__name__: c for c in (_sparsity.ConstantSparsity, _sparsity.PolynomialDecay)}


def serialize(schedule: Any) -> dict[str, Any]:
    """A schedule as a dictionary that goes into JSON.

    Args:
        schedule: of tfprune, of tfmot, or your own subclass of ``PruningSchedule``. Its
            ``get_config()`` returns the arguments, or, as tfmot's do, ``{"class_name", "config"}``.

    Raises:
        ArgumentError: it is no ``PruningSchedule``, its configuration does not go into JSON, or it
            has the name of a class of tfmot.
    """
    if not isinstance(schedule, _sparsity.PruningSchedule):
        raise ArgumentError(
            "Expected a PruningSchedule, such as tfprune.schedules.Polynomial(0.0, 0.8, 0, 1000). "
            f"Received: {schedule!r}."
        )
    kind = type(schedule)
    name = keras.saving.get_registered_name(kind)
    if _OF_TFMOT.get(name, kind) is not kind:
        raise ArgumentError(
            f"Expected a schedule with a name of its own. Received: {kind.__module__}.{name}, "
            "which would be loaded as tfmot's class of that name. Rename it, or register it with "
            "@keras.saving.register_keras_serializable(package=...)."
        )
    config = schedule.get_config()
    if set(config) == {"class_name", "config"}:
        config = config["config"]
    try:
        config = json.loads(json.dumps(config, default=_plain, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"Expected the get_config() of {name} to hold numbers, text, lists and dictionaries. "
            f"Received: {config!r} ({error})."
        ) from error
    return {"class_name": name, "config": config}


def deserialize(config: Any, custom_objects: Mapping[str, Any] | None = None) -> Any:
    """The schedule that a dictionary describes.

    Args:
        config: what :func:`serialize` returned, or tfmot's ``get_config()``.
        custom_objects: your own classes by name. Those registered with
            ``keras.saving.register_keras_serializable``, and those of an open
            ``keras.saving.custom_object_scope``, are found without it.

    Raises:
        ArgumentError: it describes no schedule, the class is unknown (the message says how to make
            it known), or the class does not take these arguments.
    """
    if not isinstance(config, Mapping) or not isinstance(config.get("config"), Mapping):
        raise ArgumentError(
            'Expected a dictionary {"class_name": ..., "config": {...}}, as '
            f"tfprune.schedules.serialize() returns it. Received: {config!r}."
        )
    # Keras's own serialize_keras_object() writes the full name beside the short one.
    name = config.get("registered_name") or config.get("class_name")
    kind = _find(name, custom_objects)
    # An open scope is where from_config() of a schedule around another one looks names up.
    with keras.saving.custom_object_scope(dict(custom_objects or {})):
        try:
            return kind.from_config(dict(config["config"]))
        except ArgumentError:
            raise
        except (TypeError, KeyError, ValueError) as error:
            raise ArgumentError(
                f"Expected arguments of {name}. Received: {config['config']!r}, which it refuses: "
                f"{error}."
            ) from error


def _find(name: Any, custom_objects: Mapping[str, Any] | None) -> Any:
    own, kind = custom_objects or {}, None
    if isinstance(name, str):
        kind = own.get(name) or keras.saving.get_registered_object(name) or _OF_TFMOT.get(name)
        # "package>Name" of a class that is registered only where the file was written.
        kind = kind or own.get(name.rpartition(">")[2])
    if kind is None:
        raise ArgumentError(
            f"Expected a schedule of tfprune or tfmot, or a known one of your own. Received: "
            f"{name!r}. Pass custom_objects={{{name!r}: its class}}, or decorate the class with "
            "@keras.saving.register_keras_serializable(package=...) and import its module first."
        )
    if not isinstance(kind, type) or not issubclass(kind, _sparsity.PruningSchedule):
        raise ArgumentError(
            f"Expected {name!r} to be a subclass of PruningSchedule. Received: {kind!r}."
        )
    return kind


def _plain(value: Any) -> Any:
    """A numpy number or array for JSON."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} {value!r}")
