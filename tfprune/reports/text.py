"""Plain-text tables and units."""

from __future__ import annotations

import io
import shutil
from collections.abc import Sequence
from typing import Any


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    right: Sequence[str] = (),
    cut: Sequence[str] = (),
    markdown: bool = False,
    width: int | None = None,
) -> str:
    """A table as text, fitted to the terminal.

    Args:
        columns: headings.
        rows: cells, turned to text.
        right: headings of the columns that are aligned to the right.
        cut: headings of the columns that are cut off, not folded, where space is short.
        markdown: as a Markdown table, never folded.
        width: of the text, in characters; by default the terminal's.
    """
    if markdown:
        rule = ["---:" if column in right else "---" for column in columns]
        lines = [columns, rule, *([str(cell).replace("|", "\\|") for cell in row] for row in rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for number, column in enumerate(columns):
        widest = max([len(column), *(len(str(row[number])) for row in rows)])
        whole = column in right or number == 0
        drawn.add_column(
            column,
            justify="right" if column in right else "left",
            no_wrap=whole or column in cut,
            overflow="ellipsis" if column in cut else "fold",
            min_width=widest if whole else min(widest, 20),
            max_width=36 if column in cut else None,
        )
    for row in rows:
        drawn.add_row(*[str(cell).replace("[", "\\[") for cell in row])
    columns_wide = width or max(shutil.get_terminal_size((120, 24)).columns, 80)
    out = io.StringIO()
    console = Console(file=out, width=columns_wide, color_system=None, highlight=False)
    console.print(drawn)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip("\n").splitlines())


def count(value: float | None) -> str:
    """A number with thousands separators; a dash for ``None``."""
    return "–" if value is None else f"{value:,.0f}"


def mega(value: float | None) -> str:
    """A number in millions, three digits; a dash for ``None``."""
    if value is None:
        return "–"
    return f"{value / 1e6:.3g} M" if value < 1e9 else f"{value / 1e9:.3g} G"


def size(value: float | None) -> str:
    """Bytes as kB or MB (powers of ten); a dash for ``None``."""
    if value is None:
        return "–"
    return f"{value / 1e6:.2f} MB" if value >= 1e6 else f"{value / 1e3:.1f} kB"


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage; a dash for ``None``."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def milliseconds(value: float | None) -> str:
    """Milliseconds with three digits; a dash for ``None``."""
    return "–" if value is None else f"{value:.3g} ms"


def shortened(names: Sequence[str], limit: int = 3) -> str:
    """The first names and how many more there are."""
    more = f" +{len(names) - limit}" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
