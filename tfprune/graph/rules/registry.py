"""Finds the rule of an operation.

Built-in rules are keyed by class name, since Keras 3 and tf_keras have classes of the same names
and neither may be imported for the other's sake. Rules for custom layers are keyed by class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from tfprune.errors import ArgumentError
from tfprune.graph.context import RuleCall
from tfprune.graph.labels import TensorLabels
from tfprune.graph.trace import symbol_of

Rule = Callable[[RuleCall], "TensorLabels | list[TensorLabels]"]
_R = TypeVar("_R", bound=Rule)

_LAYER_RULES: dict[str, Rule] = {}
_OP_RULES: dict[str, Rule] = {}
_SYMBOL_RULES: dict[str, Rule] = {}
_CUSTOM_RULES: dict[type, Rule] = {}

# What a subclass may define and still compute what its built-in parent computes.
_HARMLESS = frozenset(
    [
        "__init__",
        "__module__",
        "__doc__",
        "__qualname__",
        "__firstlineno__",
        "__static_attributes__",
        "__annotations__",
        "__annotate_func__",
        "__annotations_cache__",
        "get_config",
        "from_config",
        "get_build_config",
        "build_from_config",
        "_keras_api_export_path",
        "_keras_api_names",
        "_keras_api_names_v1",
        "__slots__",
        "__dict__",
        "__weakref__",
        "__abstractmethods__",
        "_abc_impl",
    ]
)  # fmt: skip


def layer_rule(*names: str) -> Callable[[_R], _R]:
    """Registers the rule of built-in layers, by class name."""

    def register(function: _R) -> _R:
        _LAYER_RULES.update(dict.fromkeys(names, function))
        return function

    return register


def op_rule(*names: str, symbols: tuple[str, ...] = ()) -> Callable[[_R], _R]:
    """Registers the rule of ``keras.ops`` operations by class name, and of TensorFlow symbols."""

    def register(function: _R) -> _R:
        _OP_RULES.update(dict.fromkeys(names, function))
        _SYMBOL_RULES.update(dict.fromkeys(symbols, function))
        return function

    return register


def rule(layer_class: type, function: Rule | None = None) -> Any:
    """Registers the rule of a custom layer class; usable as a decorator.

    A rule takes a :class:`~tfprune.graph.RuleCall` and returns the labels of the outputs. A layer
    that changes every value by itself, whatever its channel, needs one line::

        tfprune.rule(MyActivation, tfprune.graph.elementwise)

    A layer with one parameter per channel::

        @tfprune.rule(MyScale)
        def my_scale(call):
            labels = call.inputs[0]
            call.weight(call.op.gamma, "gamma", follows={-1: labels[-1]})
            return labels

    Args:
        layer_class: the class, of Keras 3 or tf_keras; subclasses inherit the rule.
        function: the rule.

    Raises:
        ArgumentError: ``layer_class`` is no class.
    """
    if not isinstance(layer_class, type):
        raise ArgumentError(
            f"Expected a layer class, such as MyLayer. Received: {layer_class!r}. "
            "Pass the class itself, not an instance or a name."
        )
    if function is None:

        def register(decorated: Rule) -> Rule:
            _CUSTOM_RULES[layer_class] = decorated
            return decorated

        return register
    _CUSTOM_RULES[layer_class] = function
    return function


def find_rule(op: Any) -> tuple[Rule | None, str]:
    """The rule of ``op``, or ``None`` and the reason in words why there is none."""
    cls = type(op)
    symbol = symbol_of(op)
    if symbol is not None:
        # Some functions of TensorFlow 2 are recorded as those of version 1 that they call.
        found = _SYMBOL_RULES.get(symbol.removeprefix("compat.v1."))
        return found, "" if found else f"no rule for the operation tf.{symbol}"
    overridden: list[str] = []
    for base in cls.__mro__:
        if base in _CUSTOM_RULES:
            return _CUSTOM_RULES[base], ""
        root = base.__module__.partition(".")[0]
        if root in ("keras", "tf_keras"):
            table = _OP_RULES if ".ops." in base.__module__ else _LAYER_RULES
            found = table.get(base.__name__)
            if found is not None:
                if not overridden:
                    return found, ""
                return None, (
                    f"{cls.__name__} changes {', '.join(overridden)} of {base.__name__}, so the "
                    f"built-in rule may not hold; register one with tfprune.rule({cls.__name__})"
                )
        overridden += sorted(name for name in vars(base) if name not in _HARMLESS)
        if base.__name__ in ("Layer", "Operation"):
            break
    return None, (
        f"no rule for {cls.__name__}; register one with tfprune.rule({cls.__name__}), "
        "see its documentation"
    )
