"""What identifies a model for a plan: its operations, their weights' shapes, and the wiring.

Keras numbers what a user leaves unnamed through the whole process: the same architecture has a
``conv2d`` when it is built first and a ``conv2d_1`` when it is built again. So the number at the
end of a name does not count; operations are told apart by their position.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from itertools import zip_longest
from typing import Any

from tfprune.graph.context import Record
from tfprune.graph.trace import framework_of, with_values

_Entry = tuple[str, str]
"""A path and its description."""


@dataclass(frozen=True)
class Structure:
    """The architecture of a model, without its weights' values.

    Attributes:
        layers: path -> class, shapes of the weights and where the inputs come from, in the order
            of the model: ``"Conv2D (3,3,16,32) (32) of #4"`` reads what the fifth entry puts out.
    """

    layers: Mapping[str, str]

    @cached_property
    def _canonical(self) -> list[tuple[str, str]]:
        """Paths without numbers, and descriptions, by position."""
        return [(_unnumbered(path), text) for path, text in self.layers.items()]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the structure, in hex, 16 digits; the same however Keras numbers names."""
        return hashlib.sha256(json.dumps(self._canonical).encode()).hexdigest()[:16]

    def renaming(self, other: Structure) -> dict[str, str] | None:
        """Paths of ``other`` -> paths of this structure; ``None`` if it is not the same one."""
        if self._canonical != other._canonical:
            return None
        return dict(zip(other.layers, self.layers, strict=True))

    def difference(self, other: Structure, limit: int = 3) -> str:
        """In words, where ``other`` differs from this structure; empty if it does not."""
        mine, theirs = self._named(), other._named()
        # An operation more or less moves all positions behind it: look at names first.
        lines = _by_name(mine, theirs)
        if not lines:
            texts = zip(self.layers.values(), other.layers.values(), strict=True)
            lines = [
                _change(left, right)
                for left, right, (a, b) in zip(mine, theirs, texts, strict=True)
                if a != b
            ]
        more = f"; and {len(lines) - limit} more" if len(lines) > limit else ""
        return "; ".join(lines[:limit]) + more

    def _named(self) -> list[tuple[str, str]]:
        """Descriptions with paths in the place of positions."""
        paths = list(self.layers)

        def path(match: re.Match[str]) -> str:
            position = int(match[1])
            return paths[position] if position < len(paths) else match[0]

        return [(p, re.sub(r"#(\d+)", path, text)) for p, text in self.layers.items()]


def _by_name(mine: list[_Entry], theirs: list[_Entry]) -> list[str]:
    """What differs when numbers in names are left out."""
    matcher = SequenceMatcher(
        a=[_unnumbered(path) for path, _ in mine],
        b=[_unnumbered(path) for path, _ in theirs],
        autojunk=False,
    )
    return [
        _change(left, right)
        for _, a, b, c, d in matcher.get_opcodes()
        for left, right in zip_longest(mine[a:b], theirs[c:d])
        if not left or not right or any(map(_differs, left, right))
    ]


def _differs(left: str, right: str) -> bool:
    return _unnumbered(left) != _unnumbered(right)


def _change(expected: _Entry | None, found: _Entry | None) -> str:
    if expected is None or found is None:
        path = (expected or found or ("", ""))[0]
        before = expected[1] if expected else "no such layer"
        return f"{path}: expected {before}, found {found[1] if found else 'none'}"
    named = f" named {found[0]}" if _differs(expected[0], found[0]) else ""
    return f"{expected[0]}: expected {expected[1]}, found {found[1]}{named}"


def _unnumbered(text: str) -> str:
    """Without the numbers at the ends of names."""
    return re.sub(r"_\d+(?![\w.])", "", text)


def structure_of(record: Record) -> Structure:
    """The structure of a labelled model."""
    wiring = _wiring(record)
    layers: dict[str, str] = {}
    for key, path in record.paths.items():
        op = record.ops[key]
        own = [] if _is_container(op) else with_values(getattr(op, "weights", []))
        shapes = ["(" + ",".join(str(int(s)) for s in w.shape) + ")" for w in own]
        reads = [f"of {wiring[key]}"] if key in wiring else []
        # A layer comes before the cell that shares its path, and has the cell's weights.
        layers.setdefault(path, " ".join([type(op).__name__, *shapes, *reads]))
    return Structure(layers)


def _wiring(record: Record) -> dict[int, str]:
    """For every operation of the graph, what its calls read: positions of other operations."""
    position = {path: i for i, path in enumerate(dict.fromkeys(record.paths.values()))}
    source: dict[tuple[int, int, int], str] = {}
    reads: dict[int, list[str]] = {}
    for traced in record.traces.values():
        for number, ref in enumerate(traced.inputs):
            source[ref.key] = f"input {number}"
        for call in traced.calls:
            key = id(call.op)
            seen = reads.setdefault(key, [])
            name = f"#{position[record.paths[key]]}" + (f" call {len(seen)}" if seen else "")
            for number, ref in enumerate(call.outputs):
                source[ref.key] = name + (f" output {number}" if number else "")
            seen.append(", ".join(source[ref.key] for ref in call.inputs) or "nothing")
    return {key: "; ".join(calls) for key, calls in reads.items()}


def _is_container(op: Any) -> bool:
    return framework_of(op) is not None and hasattr(op, "inputs") and hasattr(op, "layers")
