"""Pruning plans: the channels each group keeps. They can be saved, read, edited and replayed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tfprune.errors import PlanError
from tfprune.graph.groups import ChannelGraph, ChannelGroup
from tfprune.graph.structure import Structure
from tfprune.writing import replacing, writable_target

_FORMAT = "tfprune plan"
_VERSION = 1


@dataclass(frozen=True)
class PruningPlan:
    """The kept channels of every group that loses some.

    Attributes:
        kept: group name -> sorted indices of the channels kept, within the group. Groups that are
            not named keep everything.
        widths: group name -> width before pruning, for the groups named in ``kept``.
        structure: the model that the plan belongs to.
        notes: how the plan came about, in words (criterion, budget); informative only.
    """

    kept: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int]
    structure: Structure
    notes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        graph: ChannelGraph,
        kept: Mapping[str, Any],
        notes: Mapping[str, str] | None = None,
    ) -> PruningPlan:
        """A plan for ``graph`` from kept indices by group name; groups kept whole are left out.

        Raises:
            PlanError: an unknown group, one that may not be pruned, indices that are out of range
                or repeated, or nothing kept.
        """
        unknown = [name for name in kept if name not in graph.by_name]
        if unknown:
            raise _unknown_group(unknown[0])
        losing = {
            name: tuple(sorted(int(i) for i in indices))
            for name, indices in kept.items()
            if not _everything(indices, graph[name].width)
        }
        return cls(
            kept=losing,
            widths={name: graph[name].width for name in losing},
            structure=graph.structure,
            notes=dict(notes or {}),
        ).for_graph(graph)

    def for_graph(self, graph: ChannelGraph) -> PruningPlan:
        """The plan in the names of the model behind ``graph``, checked to fit it.

        Keras numbers unnamed layers anew whenever it builds a model, so that the same architecture
        may have other names: groups are found by the position of their layers then.

        Raises:
            PlanError: the model has another structure (the message says where); a group that is
                unknown, of another width or may not be pruned; indices that are out of range or
                repeated; a layer that would lose all channels on an axis.
        """
        paths = self.structure.renaming(graph.structure)
        if paths is None:
            raise PlanError(
                f"Expected the model that the plan was made for (fingerprint "
                f"{self.structure.fingerprint}). Received a model with fingerprint "
                f"{graph.structure.fingerprint}, which differs at "
                f"{self.structure.difference(graph.structure)}. Make a new plan for this model, "
                "or apply this one to a model of the same architecture."
            )
        group_by_name = {
            paths[group.path] + group.name.removeprefix(group.path): group for group in graph
        }
        kept: dict[str, tuple[int, ...]] = {}
        for name, indices in self.kept.items():
            group = group_by_name.get(name)
            if group is None:
                raise _unknown_group(name)
            _check_group(name, group, self.widths[name], indices)
            kept[group.name] = indices
        keep = graph.keep(kept)
        for site in graph.record.sites.values():
            for labels in site.labels:
                if labels is not None and len(labels) and not keep(labels).any():
                    raise PlanError(
                        f"Expected every layer to keep at least one channel. Received a plan that "
                        f"leaves {site.path!r} without any on an axis of its {site.name}."
                    )
        widths = {name: graph[name].width for name in kept}
        return PruningPlan(kept, widths, graph.structure, self.notes)

    def apply(self, model: Any) -> Any:
        """The smaller model; ``model`` is left as it is. See :func:`tfprune.surgery.apply`."""
        from tfprune.surgery import apply  # upwards on purpose: a plan is the user's handle

        return apply(model, self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, whole or not at all.

        Raises:
            ArgumentError: the folder does not exist.
            FileError: the file cannot be written.
        """
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprint": self.structure.fingerprint,
            "notes": dict(self.notes),
            "groups": {
                name: {"width": self.widths[name], "kept": list(indices)}
                for name, indices in self.kept.items()
            },
            "model": dict(self.structure.layers),
        }
        with replacing(writable_target(path)) as temporary:
            temporary.write_text(_dump(document), encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Reads a plan that :meth:`save` wrote (or a person edited).

        Raises:
            PlanError: no such file; not JSON (truncated); not a plan; of a later version.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"Expected a plan file that can be read. Received: {str(path)!r} ({error})."
            ) from error
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(
                f"Expected a plan in JSON. {str(path)!r} is damaged or no JSON: {error}. "
                "If it was cut off while being written, make the plan again."
            ) from error
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise PlanError(
                f"Expected a file written by PruningPlan.save. {str(path)!r} is JSON of another "
                'kind (it has no entry "format": "tfprune plan").'
            )
        if document.get("version") != _VERSION:
            raise PlanError(
                f"Expected a plan of version {_VERSION}. Received: version "
                f"{document.get('version')!r}. Install the tfprune that wrote it."
            )
        try:
            structure = Structure({str(k): str(v) for k, v in document["model"].items()})
            kept = {
                str(name): tuple(sorted(_index(i) for i in entry["kept"]))
                for name, entry in document["groups"].items()
            }
            widths = {str(n): _index(entry["width"]) for n, entry in document["groups"].items()}
            notes = {str(k): str(v) for k, v in document.get("notes", {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                f'Expected a plan with entries "model" and "groups". {str(path)!r} is '
                f"damaged: {type(error).__name__}: {error}."
            ) from error
        return cls(kept=kept, widths=widths, structure=structure, notes=notes)

    def __str__(self) -> str:
        from tfprune.reports.tables import plan_table

        return plan_table(self)


def _dump(document: dict[str, Any]) -> str:
    """JSON with one line per group, so that plans diff well."""
    groups = ",\n".join(
        f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in document["groups"].items()
    )
    layers = ",\n".join(
        f"    {json.dumps(name)}: {json.dumps(text)}" for name, text in document["model"].items()
    )
    head = {k: v for k, v in document.items() if k not in ("groups", "model")}
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items())
    return f'{{\n{lines},\n  "groups": {{\n{groups}\n  }},\n  "model": {{\n{layers}\n  }}\n}}\n'


def _index(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"expected an integer, found {value!r}")
    return value


def _check_group(name: str, group: ChannelGroup, width: int, indices: tuple[int, ...]) -> None:
    if not group.prunable:
        raise PlanError(
            f"Expected groups that can be pruned. Received: {name!r}, which cannot: {group.reason}."
        )
    if width != group.width:
        raise PlanError(
            f"Expected group {name!r} to have {group.width} channels. Received a plan for {width}. "
            "Make the plan again."
        )
    in_range = all(0 <= i < group.width for i in indices)
    if not indices or len(set(indices)) < len(indices) or not in_range:
        raise PlanError(
            f"Expected between 1 and {group.width} different indices from 0 to "
            f"{group.width - 1} for group {name!r}. Received: {_short(indices)}."
        )


def _everything(indices: Any, width: int) -> bool:
    return np.array_equal(np.sort(np.asarray(indices)), np.arange(width))


def _unknown_group(name: str) -> PlanError:
    return PlanError(
        f"Expected names of channel groups. Received: {name!r}, which the model has not. "
        "print(tfprune.analyse(model)) lists them."
    )


def _short(indices: tuple[int, ...]) -> str:
    text = ", ".join(str(i) for i in indices[:6])
    return f"{text}, … ({len(indices)} in all)" if len(indices) > 6 else text or "none"
