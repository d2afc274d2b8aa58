"""A progress bar on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(shown: bool, what: str, total: int, done: int) -> Iterator[Callable[[], None]]:
    """Shows how many of ``total`` are done while the block runs.

    Args:
        shown: whether to show anything.
        what: in a few words.
        total: number of steps.
        done: how many are done at the beginning.

    Yields:
        A function to be called when one more is done.
    """
    if not shown:
        yield lambda: None
        return

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda: bar.advance(task)
