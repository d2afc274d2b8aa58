"""Keeps the chatter of TensorFlow and Keras off the terminal of a command-line run."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr


@contextmanager
def quiet_process() -> Iterator[None]:
    """Silences native libraries, warnings and logs below errors; Python's streams go on.

    TensorFlow writes from C++ to file descriptor 2, before any logger can be asked to be silent.
    So the descriptor is shut, and ``sys.stderr`` gets one of its own. Everything is as before
    when the block ends. For a process that is the program's own: the library itself leaves the
    user's process alone.
    """
    with ExitStack() as stack:
        try:
            sys.stderr.flush()
            saved = os.dup(2)
        except (AttributeError, OSError, ValueError):
            # standard error is closed, as in a daemon: nothing can get there
            pass
        else:
            stack.callback(os.close, saved)
            if _descriptor() == 2:
                encoding = sys.stderr.encoding or "utf-8"
                own = stack.enter_context(
                    os.fdopen(os.dup(saved), "w", 1, encoding=encoding, errors="backslashreplace")
                )
                stack.enter_context(redirect_stderr(own))
            null = os.open(os.devnull, os.O_WRONLY)
            stack.callback(os.dup2, saved, 2)
            os.dup2(null, 2)
            os.close(null)
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        yield


def _descriptor() -> int | None:
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return None
