"""Results of long searches on disk: resumed after an interruption, refused for another search."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfprune.errors import ArgumentError
from tfprune.graph import ChannelGraph
from tfprune.workers import digest_of
from tfprune.writing import replacing, writable_target

_VERSION = 1
_MOST_BYTES = 256 * 2**20


class Results:
    """One number per key, in the order of the keys, in a file that is whole at any time.

    Attributes:
        values: key -> number, for the keys measured so far.

    Args:
        kind: what searches, such as ``"sensitivity"``.
        settings: JSON values that identify the search: model, weights, data, arguments.
        keys: of all numbers, in their order.
        path: of the file; ``None`` for none. What is there already is taken over.

    Raises:
        ArgumentError: the file is no such, or of another search.
        FileError: the place cannot be written.
    """

    def __init__(
        self,
        kind: str,
        settings: Mapping[str, Any],
        keys: Sequence[str],
        path: str | os.PathLike[str] | None,
    ) -> None:
        self._kind = kind
        # As it will be read: JSON makes lists of tuples.
        self._settings = json.loads(json.dumps(settings))
        self._keys = list(keys)
        self._path = None if path is None else writable_target(path)
        self.values: dict[str, float] = {}
        if self._path is not None and self._path.exists():
            found, self.values = read(kind, self._path)
            _check_same(self._path, found, self._settings)

    @property
    def missing(self) -> list[str]:
        """The keys that are not measured yet, in order."""
        return [key for key in self._keys if key not in self.values]

    def add(self, key: str, value: float) -> None:
        """Takes a number, and writes the file anew."""
        self.values[key] = value
        if self._path is not None:
            with replacing(self._path) as temporary:
                temporary.write_text(
                    dump(self._kind, self._settings, self._keys, self.values), encoding="utf-8"
                )


def dump(
    kind: str, settings: Mapping[str, Any], keys: Sequence[str], values: Mapping[str, float]
) -> str:
    """The file's text: JSON, one line per setting and number."""
    heads = [("format", f"tfprune {kind}"), ("version", _VERSION)]
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in heads]
    results = {key: values[key] for key in keys if key in values}
    for name, entries in (("settings", settings), ("results", results)):
        inner = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items())
        lines.append(f"  {json.dumps(name)}: {{\n{inner}\n  }}" if inner else f'  "{name}": {{}}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(kind: str, path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """Settings and results of a file.

    Raises:
        ArgumentError: it cannot be read, or is no file of this kind.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES:,} bytes")
        document = json.loads(content.decode("utf-8"))
        if document.get("format") != f"tfprune {kind}":
            raise ValueError(f'no entry "format": "tfprune {kind}"')
        if document["version"] != _VERSION:
            raise ValueError(f"version {document['version']!r}, and {_VERSION} is known")
        settings = dict(document["settings"])
        values = {str(key): _number(value) for key, value in document["results"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArgumentError(
            f"Expected a file of results of tfprune's {kind}. Received: {os.fspath(path)!r} "
            f"({type(error).__name__}: {error}). Remove it, or give another path."
        ) from error
    return settings, values


def weights_digest(graph: ChannelGraph) -> str:
    """SHA-256 of all weights of a model, in hex, 16 digits."""
    return digest_of([np.asarray(weight) for weight in graph.model.weights])


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, found {value!r}")
    return float(value)


def _check_same(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    changed = [
        f"{key}: {_short(found.get(key))} there, {_short(wanted.get(key))} here"
        for key in dict.fromkeys([*wanted, *found])
        if found.get(key) != wanted.get(key)
    ]
    if changed:
        raise ArgumentError(
            f"Expected a file of the same search. Received: {str(path)!r}, which differs in "
            f"{'; '.join(changed)}. Give another path, or remove the file."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
