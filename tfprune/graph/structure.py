"""What identifies a model for a plan: its operations, their classes and the shapes of weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from tfprune.graph.context import Record
from tfprune.graph.trace import framework_of, with_values


@dataclass(frozen=True)
class Structure:
    """The architecture of a model, without its weights' values.

    Attributes:
        layers: path -> class and shapes of the weights, such as ``"Conv2D (3,3,16,32) (32)"``.
    """

    layers: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the structure, in hex, 16 digits."""
        text = json.dumps(self.layers, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def difference(self, other: Structure, limit: int = 3) -> str:
        """In words, where ``other`` differs from this structure; empty if it does not."""
        lines = []
        for path in [*self.layers, *(p for p in other.layers if p not in self.layers)]:
            mine, theirs = self.layers.get(path), other.layers.get(path)
            if mine != theirs:
                lines.append(
                    f"{path}: expected {mine or 'no such layer'}, found {theirs or 'none'}"
                )
        more = f"; and {len(lines) - limit} more" if len(lines) > limit else ""
        return "; ".join(lines[:limit]) + more


def structure_of(record: Record) -> Structure:
    """The structure of a labelled model."""
    layers: dict[str, str] = {}
    for key, path in record.paths.items():
        op = record.ops[key]
        own = [] if _is_container(op) else with_values(getattr(op, "weights", []))
        shapes = " ".join("(" + ",".join(str(int(s)) for s in w.shape) + ")" for w in own)
        # A layer comes before the cell that shares its path, and has the cell's weights.
        layers.setdefault(path, f"{type(op).__name__} {shapes}".strip())
    return Structure(layers)


def _is_container(op: Any) -> bool:
    return framework_of(op) is not None and hasattr(op, "inputs") and hasattr(op, "layers")
