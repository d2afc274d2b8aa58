"""Progress of long work on standard error, when asked for."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import IO

Step = Callable[[str], None]


@contextlib.contextmanager
def progress(verbose: int, total: int) -> Iterator[Step]:
    """Shows a bar of ``total`` steps on standard error while the block runs.

    Args:
        verbose: 0 shows nothing, 1 or more the bar.
        total: The number of steps.

    Yields:
        A function to be called with a few words at the beginning of every step.
    """
    if verbose <= 0:
        yield _silent
        return

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(
            Progress(
                BarColumn(bar_width=20),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=Console(file=_own_stderr(stack)),
            )
        )
        task = bar.add_task("", total=total)
        begun = 0

        def step(description: str) -> None:
            nonlocal begun
            bar.update(task, description=description, completed=begun)
            begun += 1

        yield step
        bar.update(task, description="done", completed=total)


def _silent(description: str) -> None:
    del description


def _own_stderr(stack: contextlib.ExitStack) -> IO[str]:
    """Standard error, through a descriptor of its own where the work redirects number 2."""
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return sys.stderr
    if descriptor != 2:
        return sys.stderr
    stream = os.fdopen(os.dup(descriptor), "w", encoding="utf-8")
    return stack.enter_context(stream)
