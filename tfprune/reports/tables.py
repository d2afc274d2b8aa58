"""Tables of what the other packages found; nothing is computed here."""

from __future__ import annotations

from tfprune.cost import Cost, CostModel
from tfprune.graph import ChannelGraph
from tfprune.graph.blocks import blocks_of
from tfprune.graph.plan import PruningPlan
from tfprune.reports.text import count, mega, percent, shortened, size, table


def graph_table(graph: ChannelGraph, *, markdown: bool = False, width: int | None = None) -> str:
    """One row per channel group: what can go, what cannot, and why."""
    costs = CostModel(graph)
    shares = costs.share_of_macs()
    rows = []
    for group in graph.groups:
        verdict = "yes" if group.prunable else f"no: {group.reason}"
        if group.prunable and not group.exact:
            verdict = f"yes, inexact: {group.inexact_reason}"
        rows.append(
            (
                group.name,
                group.width,
                shortened(group.layers, 2),
                percent(shares.get(group.name)),
                verdict,
            )
        )
    channels = sum(group.width for group in graph.prunable)
    head = (
        f"{graph.model.name}: {len(graph.prunable)} of {len(graph.groups)} channel groups can be "
        f"pruned, {channels:,} channels in all"
    )
    if shares:
        head += f"; {percent(costs.frozen_share_of_macs())} of the MACs are out of reach"
    body = table(
        ("group", "width", "layers", "MACs", "prunable"),
        rows,
        right=("width", "MACs"),
        cut=("layers",),
        markdown=markdown,
        width=width,
    )
    tail = (
        "MACs: the share that would go with all of the group's channels; a layer counts for the "
        "groups that it reads and writes."
    )
    parts = [head, body, tail]
    blocks = _block_rows(graph, costs.macs(costs.full_mask()) if shares else 0)
    if blocks:
        many = len(blocks) > 1
        parts.append(f"{len(blocks)} block{'s' if many else ''} can be removed whole:")
        parts.append(
            table(
                ("block", "layers", "MACs"),
                blocks,
                right=("MACs",),
                cut=("layers",),
                markdown=markdown,
                width=width,
            )
        )
    return "\n\n".join(parts)


def _block_rows(graph: ChannelGraph, macs: int) -> list[tuple[str, str, str]]:
    """Name, layers and share of the MACs (0 if they are not known) of every residual block."""
    weighted = {member.path for group in graph for member in group.members}
    rows = []
    for block in blocks_of(graph):
        layers = [path for path in block.layers if path in weighted] or list(block.layers)
        share = None
        if macs:
            left = CostModel(graph, [block.name])
            share = 1 - left.macs(left.full_mask()) / macs
        rows.append((block.name, shortened(layers, 2), percent(share)))
    return rows


def plan_table(plan: PruningPlan) -> str:
    """One row per group that loses channels, and the blocks that go."""
    rows = [
        (name, plan.widths[name], len(kept), percent(1 - len(kept) / plan.widths[name]))
        for name, kept in plan.kept.items()
    ]
    before = sum(plan.widths.values())
    after = sum(len(kept) for kept in plan.kept.values())
    asked = "; ".join(f"{key}: {value}" for key, value in plan.notes.items())
    head = (
        f"Plan for a model with fingerprint {plan.structure.fingerprint}: {len(plan.kept)} groups "
        f"lose {before - after:,} of {before:,} channels"
    )
    if plan.values:
        many = len(plan.values) > 1
        head += f"; {len(plan.values)} weight{'s get' if many else ' gets'} new values"
    if plan.blocks:
        many = len(plan.blocks) > 1
        head += f"; {len(plan.blocks)} block{'s go' if many else ' goes'}"
    parts = [f"{head}\n{asked}" if asked else head]
    if rows or not plan.blocks:
        columns = ("group", "width", "kept", "pruned")
        parts.append(table(columns, rows, right=columns[1:]))
    if plan.blocks:
        parts.append(table(("block removed",), [(name,) for name in plan.blocks]))
    return "\n\n".join(parts)


def cost_table(cost: Cost, *, markdown: bool = False) -> str:
    """One row per operation that has parameters or MACs, and the totals."""
    rows = [
        (
            layer.path,
            layer.kind,
            count(layer.parameters),
            count(layer.macs),
            count(layer.activation_bytes),
        )
        for layer in cost.layers
        if layer.parameters or layer.macs
    ]
    rows.append(
        ("total", "", count(cost.parameters), count(cost.macs), count(cost.activation_bytes))
    )
    body = table(
        ("layer", "kind", "parameters", "MACs", "activation bytes"),
        rows,
        right=("parameters", "MACs", "activation bytes"),
        markdown=markdown,
    )
    head = (
        f"{mega(cost.parameters)} parameters ({size(cost.size_bytes)}), {mega(cost.macs)}ACs, "
        f"{size(cost.activation_bytes)} of activations per example"
    )
    return f"{head}\n\n{body}"
