"""Ctrl-C: while native libraries start, and in the middle of their work."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noted_interrupts() -> Iterator[threading.Event]:
    """Yields an event that is set once the process was interrupted.

    An interrupt need not arrive as a :class:`KeyboardInterrupt`: in the middle of TensorFlow's
    tracing, or in C++ code that calls Python, it has been seen to turn into a ``RuntimeError`` of
    the code that unwinds, and frames that are left half-way complain when they are collected. So
    the event tells what an exception was due to, and after it such complaints are not shown.
    """
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # only the main thread may handle signals, and gets them
        return

    def note(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        sys.unraisablehook = lambda unraisable: None
        raise KeyboardInterrupt

    before, hook = signal.signal(signal.SIGINT, note), sys.unraisablehook
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
        if interrupted.is_set():
            gc.collect()  # what complains does so before the hook is back
        sys.unraisablehook = hook


@contextmanager
def leaving_at_once(message: str, code: int) -> Iterator[None]:
    """An interrupt inside the block ends the process there and then, with a message.

    For imports of native libraries, during which nothing is being written: an exception in the
    middle of TensorFlow's start-up code has been seen to crash the process with a segmentation
    fault.

    Args:
        message: for standard error.
        code: the exit code.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals, and gets them
        return

    def leave(number: int, frame: FrameType | None) -> None:
        print(message, file=sys.stderr, flush=True)
        os._exit(code)

    before = signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
