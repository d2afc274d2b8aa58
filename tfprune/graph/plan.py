"""Pruning plans: the channels each group keeps, blocks to remove, new values for some weights.

They can be saved, read, edited and replayed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.errors import PlanError
from tfprune.graph import values as new_values
from tfprune.graph.blocks import blocks_of, calls_of, owner, removal, unread_inputs
from tfprune.graph.groups import ChannelGraph, ChannelGroup
from tfprune.graph.structure import Structure
from tfprune.writing import replacing, writable_target

_FORMAT = "tfprune plan"
# A plan is written as the first version that knew all that it has.
_VERSION, _VERSION_WITH_VALUES, _VERSION_WITH_BLOCKS = 1, 2, 3
# Of the JSON. The plan of the largest network of keras.applications takes less than a hundredth.
_MOST_BYTES = 64 * 2**20


@dataclass(frozen=True)
class PruningPlan:
    """The kept channels of every group that loses some, blocks to remove, and new values.

    Attributes:
        kept: group name -> sorted indices of the channels kept, within the group. Groups that are
            not named keep everything.
        widths: group name -> width before pruning, for the groups named in ``kept``.
        structure: the model that the plan belongs to.
        notes: how the plan came about, in words (criterion, budget); informative only.
        values: new values that take the place of slices of the model's (reconstruction): full name
            of a weight, such as ``"block/conv/kernel"`` (``Member.full_name``) -> read-only
            floating-point array in the shape of the *pruned* weight: the kept positions only, in
            ascending order. A bias may get some as well as a kernel. They were found for one
            set of weights: a plan that is applied to a sibling, a model of the same architecture
            with other weights, gives it the same values.
        blocks: names of the blocks that are removed whole, in the order of the model, see
            :func:`tfprune.graph.blocks.blocks_of`.
    """

    kept: Mapping[str, tuple[int, ...]]
    widths: Mapping[str, int]
    structure: Structure
    notes: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", new_values.frozen(self.values))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PruningPlan):
            return NotImplemented
        mine, others = (
            (plan.kept, plan.widths, plan.structure, plan.notes, plan.blocks)
            for plan in (self, other)
        )
        return mine == others and new_values.equal(self.values, other.values)

    @classmethod
    def of(
        cls,
        graph: ChannelGraph,
        kept: Mapping[str, Any],
        notes: Mapping[str, str] | None = None,
        values: Mapping[str, Any] | None = None,
        blocks: Collection[str] = (),
    ) -> PruningPlan:
        """A plan for ``graph`` from kept indices by group name; groups kept whole are left out.

        Args:
            graph: the analysed model.
            kept: group name -> indices of the channels that stay.
            notes: how the plan came about.
            values: new values for weights, as in :attr:`values`; copied.
            blocks: names of the blocks to remove.

        Raises:
            PlanError: an unknown group, one that may not be pruned, indices that are out of range
                or repeated, or nothing kept; an unknown block, one named twice, or blocks that
                leave an input without a reader; new values for an unknown weight, one in a removed
                block, of another shape than the kept part of the weight, of another type than
                floating point, or not finite.
        """
        if isinstance(blocks, str):
            raise PlanError(
                f"Expected a list of names of blocks. Received: the string {blocks!r}. "
                f"Pass [{blocks!r}]."
            )
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
            values={} if values is None else values,
            blocks=tuple(blocks),
        ).for_graph(graph)

    def with_values(self, graph: ChannelGraph, values: Mapping[str, Any]) -> PruningPlan:
        """The plan with new values for more weights, in the names of ``graph``.

        Args:
            graph: the analysed model.
            values: as in :attr:`values`; they replace those that the plan has for the same weights.

        Raises:
            PlanError: the plan or the values do not fit, as in :meth:`of`.
        """
        plan = self.for_graph(graph)
        return replace(plan, values={**plan.values, **new_values.frozen(values)}).for_graph(graph)

    def noted(self, notes: Mapping[str, str]) -> PruningPlan:
        """The plan with more notes."""
        return replace(self, notes={**self.notes, **notes})

    def for_graph(self, graph: ChannelGraph) -> PruningPlan:
        """The plan in the names of the model behind ``graph``, checked to fit it.

        Keras numbers unnamed layers anew whenever it builds a model, so that the same architecture
        may have other names: groups and weights are found by the position of their layers then.

        Raises:
            PlanError: the model has another structure (the message says where); a group that is
                unknown, of another width or may not be pruned; indices that are out of range or
                repeated; a layer that would lose all channels on an axis; blocks that are unknown,
                named twice or leave an input without a reader; new values that do not fit.
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
        values = new_values.fitted(graph.record, keep, self.values, paths)
        blocks = _fitting_blocks(graph, self.blocks, paths)
        _check_values_stay(graph, blocks, values)
        return PruningPlan(kept, widths, graph.structure, self.notes, values, blocks)

    def apply(self, model: Any) -> Any:
        """The smaller model; ``model`` is left as it is. See :func:`tfprune.surgery.apply`.

        ``model`` may be any of the architecture: a sibling with other weights loses the same
        channels and gets the same new values.
        """
        from tfprune.surgery import apply  # upwards on purpose: a plan is the user's handle

        return apply(model, self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, whole or not at all.

        New values go into one file beside it: ``plan.values.npz`` for ``plan.json``. The JSON names
        it with a checksum, so that neither is ever read with the other of another plan. Move or
        copy both. A plan without new values writes none, and leaves one that is there alone.

        Raises:
            ArgumentError: the folder does not exist.
            FileError: a file cannot be written.
        """
        target = writable_target(path)
        document: dict[str, Any] = {
            "format": _FORMAT,
            "version": self._version(),
            "fingerprint": self.structure.fingerprint,
            "notes": dict(self.notes),
            **({"blocks": list(self.blocks)} if self.blocks else {}),
            "groups": {
                name: {"width": self.widths[name], "kept": list(indices)}
                for name, indices in self.kept.items()
            },
            "model": dict(self.structure.layers),
        }
        if not self.values:
            with replacing(target) as temporary:
                temporary.write_text(_dump(document), encoding="utf-8")
            return
        beside = writable_target(new_values.file_beside(target))
        # Both are complete before the first takes its place; between the two, what stands there
        # are files of different plans, which are refused.
        with replacing(target) as temporary, replacing(beside) as arrays:
            document["values"] = new_values.write_arrays(
                arrays, new_values.file_beside(target).name, self.values, self.kept
            )
            temporary.write_text(_dump(document), encoding="utf-8")

    def _version(self) -> int:
        if self.blocks:
            return _VERSION_WITH_BLOCKS
        return _VERSION_WITH_VALUES if self.values else _VERSION

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PruningPlan:
        """Reads a plan that :meth:`save` wrote (or a person edited).

        Raises:
            PlanError: no such file; too large; not JSON (truncated); not a plan; of a later
                version; the file with its new values is missing, damaged or of another plan, or
                was made for other channels than the JSON keeps.
        """
        try:
            with open(path, "rb") as file:
                content = file.read(_MOST_BYTES + 1)
            text = content.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"Expected a plan file that can be read. Received: {str(path)!r} ({error})."
            ) from error
        if len(content) > _MOST_BYTES:
            raise PlanError(
                f"Expected a plan of at most {_MOST_BYTES:,} bytes. {str(path)!r} is larger, which "
                "no plan is that tfprune writes."
            )
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:  # a JSONDecodeError is a ValueError
            raise PlanError(
                f"Expected a plan in JSON. {str(path)!r} is damaged or no JSON: {error}. "
                "If it was cut off while being written, make the plan again."
            ) from error
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise PlanError(
                f"Expected a file written by PruningPlan.save. {str(path)!r} is JSON of another "
                'kind (it has no entry "format": "tfprune plan").'
            )
        version = document.get("version")
        known = (_VERSION, _VERSION_WITH_VALUES, _VERSION_WITH_BLOCKS)
        if version not in known:
            raise PlanError(
                f"Expected a plan of a version from {known[0]} to {known[-1]}. Received: "
                f"version {version!r}. Install the tfprune that wrote it."
            )
        for entry, first in (("values", _VERSION_WITH_VALUES), ("blocks", _VERSION_WITH_BLOCKS)):
            if version < first and entry in document:
                raise PlanError(
                    f'Expected a plan of version {version} without an entry "{entry}", which came '
                    f"with version {first}. {str(path)!r} is damaged; make the plan again."
                )
        try:
            structure = Structure({str(k): str(v) for k, v in document["model"].items()})
            kept = {
                str(name): tuple(sorted(_index(i) for i in entry["kept"]))
                for name, entry in document["groups"].items()
            }
            widths = {str(n): _index(entry["width"]) for n, entry in document["groups"].items()}
            notes = {str(k): str(v) for k, v in document.get("notes", {}).items()}
            blocks = tuple(_text(name) for name in _list(document.get("blocks", [])))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(
                f'Expected a plan with entries "model" and "groups". {str(path)!r} is '
                f"damaged: {type(error).__name__}: {error}."
            ) from error
        values: Mapping[str, Any] = {}
        if "values" in document:
            real = Path(os.path.realpath(path))  # save follows a symbolic link, too
            values = new_values.read_arrays(real, document["values"], kept)
        return cls(kept, widths, structure, notes, values, blocks)

    def __str__(self) -> str:
        from tfprune.reports.tables import plan_table

        return plan_table(self)


def _dump(document: dict[str, Any]) -> str:
    """JSON with one line per group, weight and layer, so that plans diff well."""
    lines = [
        f"  {json.dumps(key)}: {json.dumps(value)}"
        for key, value in document.items()
        if key not in ("groups", "values", "model")
    ]
    lines.append(f'  "groups": {_block(document["groups"], 2)}')
    if "values" in document:
        entry = document["values"]
        inner = [
            f"    {json.dumps(key)}: {json.dumps(value)}"
            for key, value in entry.items()
            if key != "weights"
        ]
        inner.append(f'    "weights": {_block(entry["weights"], 4)}')
        lines.append('  "values": {\n' + ",\n".join(inner) + "\n  }")
    lines.append(f'  "model": {_block(document["model"], 2)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _block(entries: Mapping[str, Any], indent: int) -> str:
    """A JSON object with one line per entry."""
    space = " " * indent
    lines = ",\n".join(
        f"{space}  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()
    )
    return f"{{\n{lines}\n{space}}}"


def _index(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"expected an integer, found {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a name, found {value!r}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, found {value!r}")
    return value


def _fitting_blocks(
    graph: ChannelGraph, names: tuple[str, ...], paths: Mapping[str, str]
) -> tuple[str, ...]:
    """The blocks in the names and the order of the graph.

    Args:
        graph: the analysed model.
        names: of the plan.
        paths: paths of the model -> paths of the plan.
    """
    if not names:
        return ()
    found = {
        paths[block.path] + block.name.removeprefix(block.path): block.name
        for block in blocks_of(graph)
    }
    for name in names:
        if name not in found:
            these = ", ".join(map(repr, list(found)[:3])) or "none"
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise PlanError(
                f"Expected names of blocks that can be removed. Received: {name!r}. The model has "
                f"{these}{more}; tfprune.graph.blocks.blocks_of lists them."
            )
        if names.count(name) > 1:
            raise PlanError(
                f"Expected every block once. Received: {name!r} {names.count(name)} times. Name it "
                "once."
            )
    result = tuple(name for known, name in found.items() if known in names)
    if unread_inputs(graph, removal(graph, result)):
        raise PlanError(
            f"Expected blocks that leave every input of the model a reader. Received: "
            f"{', '.join(map(repr, names))}, without which one has none. Keep one of them."
        )
    return result


def _check_values_stay(
    graph: ChannelGraph, blocks: tuple[str, ...], values: Mapping[str, Any]
) -> None:
    """New values are for weights that the pruned model has."""
    if not blocks or not values:
        return
    stays: dict[str, bool] = {}
    for path, _, gone in calls_of(graph, removal(graph, blocks)):
        stays[path] = stays.get(path, False) or not gone
    for name in values:
        of = owner(name, stays)
        if of is not None and not stays[of]:
            raise PlanError(
                f"Expected new values for weights that stay. Received: {name!r}, which goes with a "
                "removed block. Leave it out, or keep the block."
            )


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
