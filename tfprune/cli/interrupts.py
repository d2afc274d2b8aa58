"""Ctrl-C while native libraries start."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
