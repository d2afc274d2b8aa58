"""Catching what C++ and Python print, without anything of it lasting."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings

import pytest

from tfprune.litert.progress import progress
from tfprune.litert.quiet import captured_output


def test_everything_is_caught_and_nothing_after(capfd) -> None:
    before = (sys.stdout, sys.stderr, list(warnings.filters))
    with captured_output() as text:
        print("from Python")
        os.write(1, b"from C, out\n")
        os.write(2, b"from C, err\n")
        sys.stderr.write("from Python, err\n")
        warnings.warn("a warning", stacklevel=1)
        caught = text()
    print("after")
    assert (sys.stdout, sys.stderr, list(warnings.filters)) == before
    assert set(caught.splitlines()) == {
        "from Python",
        "from C, out",
        "from C, err",
        "from Python, err",
    }
    assert capfd.readouterr() == ("after\n", "")


def test_restored_after_an_error(capfd) -> None:
    def fail() -> None:
        with captured_output():
            os.write(1, b"lost\n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    os.write(1, b"seen\n")
    assert capfd.readouterr() == ("seen\n", "")


def test_a_logger_set_up_meanwhile_lives_on(capfd) -> None:
    with captured_output():
        handler = logging.StreamHandler()
        handler.emit(logging.makeLogRecord({"msg": "caught"}))
    handler.emit(logging.makeLogRecord({"msg": "after"}))
    assert capfd.readouterr() == ("", "after\n")


def test_a_logger_with_a_stream_of_its_own(capfd) -> None:
    """As TensorFlow's, in a notebook: it was set up long ago, with the notebook's own stream."""
    stream = io.StringIO()
    logger = logging.getLogger("tfprune.tests.quiet")
    logger.addHandler(logging.StreamHandler(stream))
    logger.propagate = False
    before = logging.root.manager.disable
    with captured_output():
        logger.warning("caught")
        logger.error("an error is still told")
    logger.warning("after")
    assert stream.getvalue() == "an error is still told\nafter\n"
    assert logging.root.manager.disable == before


def test_only_the_end_of_long_output_is_kept() -> None:
    with captured_output() as text:
        for _ in range(300):
            os.write(2, b"x" * 8191 + b"\n")
        os.write(2, b"the end\n")
        assert len(text()) == 1 << 20
        assert text().endswith("\nthe end\n")


def test_closed_descriptor() -> None:
    """As in a daemon."""
    copy = os.dup(1)
    os.close(1)
    try:
        with captured_output():
            os.write(2, b"caught\n")
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(1)
    finally:
        os.dup2(copy, 1)
        os.close(copy)


def test_progress_shows_through(capfd) -> None:
    with progress(1, total=2) as step:
        step("first")
        with captured_output():
            step("second")
            os.write(2, b"noise\n")
    out, err = capfd.readouterr()
    assert out == ""
    assert "done" in err and "noise" not in err


def test_no_progress_unless_asked(capfd) -> None:
    with progress(0, total=1) as step:
        step("first")
    assert capfd.readouterr() == ("", "")
