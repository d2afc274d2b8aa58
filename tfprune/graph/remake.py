"""Makes a layer or operation again from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tfprune.errors import ModelError
from tfprune.graph.trace import framework_module, framework_of, lambda_output_shape


def remake(
    op: Any,
    change: Callable[[dict[str, Any]], Any] = lambda config: config,
    path: str = "",
    kind: Any = None,
) -> Any:
    """The same layer or operation anew, unbuilt.

    Args:
        op: of Keras 3 or tf_keras.
        change: from its configuration to the one in its place.
        path: of the layer in its model, for the message; by default its name.
        kind: the class to make, with the same configuration; by default its own.

    Raises:
        ModelError: it cannot be made from its configuration.
    """
    if type(op).__name__ == "Lambda" and framework_of(op) == "keras":
        # In its configuration the function is code, which Keras refuses to load in safe mode.
        return framework_module("keras").layers.Lambda(
            op.function,
            output_shape=lambda_output_shape(op),
            mask=op.mask,
            arguments=op.arguments,
            name=op.name,
            dtype=op.dtype_policy,
        )
    try:
        return (kind or type(op)).from_config(change(op.get_config()))
    except Exception as error:
        raise ModelError(
            "Expected a layer that can be made from its configuration. Received: "
            f"{type(op).__name__} at {path or op.name!r}, whose from_config(get_config()) fails "
            f"with {type(error).__name__}: {error}. Give it a get_config that returns the "
            "arguments of its constructor."
        ) from error
