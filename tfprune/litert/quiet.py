"""Keeping the converter's and the runtime's chatter off the user's terminal.

Most of it is written by C++ straight to file descriptors 1 and 2, where neither Python's logging
nor an environment variable reaches it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import IO, Any

_KEPT_BYTES = 1 << 20


@contextlib.contextmanager
def captured_output() -> Iterator[Callable[[], str]]:
    """Sends what is written to file descriptors 1 and 2 to a temporary file, and restores both.

    ``sys.stdout`` and ``sys.stderr`` go there too, as in a notebook they are others. Python
    warnings are held back, and so are log records below errors: a logger may write to a stream of
    its own. The whole process is concerned, so keep the block short and leave
    threads that print out of it.

    Yields:
        A function that returns what has been caught so far, its last mebibyte at most.
    """
    _flush()
    saved: list[tuple[int, int]] = []
    with (
        tempfile.TemporaryFile() as sink,
        os.fdopen(os.dup(sink.fileno()), "w", encoding="utf-8", errors="replace") as stream,
        _diverted("stdout", stream),
        _diverted("stderr", stream),
        warnings.catch_warnings(),
        _no_logs_below_errors(),
    ):
        warnings.simplefilter("ignore")

        def text() -> str:
            _flush()
            size = os.fstat(sink.fileno()).st_size
            # pread leaves the shared offset alone, at which the descriptors go on writing
            start = max(0, size - _KEPT_BYTES)
            return os.pread(sink.fileno(), _KEPT_BYTES, start).decode("utf-8", "replace")

        try:
            for descriptor in (1, 2):
                # a daemon may run with these closed; then there is nothing to keep quiet
                with contextlib.suppress(OSError):
                    saved.append((descriptor, os.dup(descriptor)))
                    os.dup2(sink.fileno(), descriptor)
            yield text
        finally:
            _flush()
            for descriptor, copy in saved:
                os.dup2(copy, descriptor)
                os.close(copy)


@contextlib.contextmanager
def _no_logs_below_errors() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


class _Stream:
    """Stands for one stream and then for another.

    A logger that is set up while output is caught keeps what ``sys.stderr`` was at that moment; it
    is to write to the real one afterwards.
    """

    def __init__(self, now: IO[str], later: IO[str]) -> None:
        self._target = now
        self._later = later

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def release(self) -> None:
        self._target = self._later


@contextlib.contextmanager
def _diverted(name: str, to: IO[str]) -> Iterator[None]:
    original = getattr(sys, name)
    if original is None:
        yield
        return
    stream = _Stream(to, original)
    setattr(sys, name, stream)
    try:
        yield
    finally:
        stream.release()
        setattr(sys, name, original)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            # a notebook may have closed or replaced them
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
