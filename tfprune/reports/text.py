"""Plain-text tables and units."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

_GAP = "  "
_FLOORS = (28, 16)
"""How far columns are squeezed at first, and then; what is still too wide stays so."""


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    right: Sequence[str] = (),
    cut: Sequence[str] = (),
    markdown: bool = False,
    width: int | None = None,
) -> str:
    """A table as text, fitted to the terminal. No column is ever left out.

    Where space is short, first the columns of ``cut`` are cut off with an ellipsis, then the other
    texts are folded; numbers and the first column stay whole.

    Args:
        columns: headings.
        rows: cells, turned to text.
        right: headings of the columns that are aligned to the right.
        cut: headings of the columns that are cut off, not folded, where space is short.
        markdown: as a Markdown table, never folded.
        width: of the text, in characters; by default the terminal's.
    """
    cells = [[" ".join(str(cell).split()) for cell in row] for row in rows]
    if markdown:
        rule = ["---:" if column in right else "---" for column in columns]
        escaped = ([cell.replace("|", "\\|") for cell in row] for row in cells)
        whole = [list(columns), rule, *escaped]
        return "\n".join("| " + " | ".join(line) + " |" for line in whole)
    widths = [max(map(len, (name, *column))) for name, column in _by_column(columns, cells)]
    soft = [n for n, name in enumerate(columns) if n and name not in right and name not in cut]
    for floor in _FLOORS:
        for number in [*(n for n, name in enumerate(columns) if name in cut), *soft]:
            excess = max(_total(widths) - (width or terminal_width()), 0)
            least = min(widths[number], max(floor, len(columns[number])))
            widths[number] = max(least, widths[number] - excess)
    lines = _line(columns, widths, columns, right, cut)
    lines.append("─" * _total(widths))
    for row in cells:
        lines += _line(row, widths, columns, right, cut)
    return "\n".join(lines)


def terminal_width() -> int:
    """Of standard output, in characters; 120 where that is no terminal, and 80 at least."""
    return max(shutil.get_terminal_size((120, 24)).columns, 80)


def _by_column(
    columns: Sequence[str], cells: Sequence[Sequence[str]]
) -> list[tuple[str, list[str]]]:
    return [(name, [row[number] for row in cells]) for number, name in enumerate(columns)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _line(
    row: Sequence[str],
    widths: Sequence[int],
    columns: Sequence[str],
    right: Sequence[str],
    cut: Sequence[str],
) -> list[str]:
    """One row, as several lines where a cell has to be folded."""
    folded = []
    for cell, name, width in zip(row, columns, widths, strict=True):
        if name in cut and len(cell) > width:
            folded.append([cell[: width - 1] + "…"])
        else:
            folded.append(textwrap.wrap(cell, width) or [""])
    lines = []
    for number in range(max(map(len, folded))):
        parts = [part[number] if number < len(part) else "" for part in folded]
        lines.append(
            _GAP.join(
                part.rjust(width) if name in right else part.ljust(width)
                for part, name, width in zip(parts, columns, widths, strict=True)
            ).rstrip()
        )
    return lines


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
