"""The command line: ``tfprune inspect | prune | export | benchmark | compare | train | demo``.

Exit codes: 0 done; 1 the request cannot be met, or failed (the message says why); 2 wrong usage;
3 a check failed, nothing was written; 130 interrupted. Reports go to standard output, progress
and errors to standard error.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from threading import Event

from tfprune.cli.interrupts import leaving_at_once, noted_interrupts
from tfprune.cli.parser import build_parser, parse
from tfprune.errors import TfpruneError

OK, REFUSED, USAGE, CHECK_FAILED, INTERRUPTED = 0, 1, 2, 3, 130

_INTERRUPTED = "interrupted; nothing half-written is left."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code.

    Raises:
        SystemExit: for ``--help``, ``--version`` and wrong usage, as argparse does.
    """
    options = parse(arguments)
    if options.command is None:
        build_parser().print_help()
        return USAGE
    with noted_interrupts() as interrupted:
        return _code(options, interrupted)


def _code(options: Namespace, interrupted: Event) -> int:
    try:
        return _run(options)
    except BrokenPipeError:
        # The reader of our output has left, as `head` does: nobody to tell, nothing to flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return OK
    except KeyboardInterrupt:
        text, code = _INTERRUPTED, INTERRUPTED
    except TfpruneError as error:
        text, code = str(error), REFUSED
    # The last line of defence: whoever types a command is not to be shown a stack of frames.
    except Exception as error:
        if options.debug:
            raise
        text, code = _unexpected(error), REFUSED
    if interrupted.is_set():
        text, code = _INTERRUPTED, INTERRUPTED
    print(_text(options, text), file=sys.stderr)
    return code


def _run(options: Namespace) -> int:
    from tfprune.cli.quiet import quiet_process
    from tfprune.loading import model_file

    if "model_file" in options:
        model_file(options.model_file)  # a mistyped name is known before TensorFlow has started
    with nullcontext() if options.debug else quiet_process():
        with leaving_at_once(_text(options, _INTERRUPTED), INTERRUPTED):
            import keras  # noqa: F401  # and with it the backend, which every command needs

            from tfprune.cli import commands

        code = int(getattr(commands, options.command)(options))
        sys.stdout.flush()
        return code


def _text(options: Namespace, text: str) -> str:
    return f"tfprune {options.command}: {text}"


def _unexpected(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    if isinstance(error, MemoryError):
        return "ran out of memory. Try fewer --runs or a smaller --subset, or a larger machine."
    if isinstance(error, ImportError):
        return f"{text}. A package that tfprune needs cannot be imported; install it again."
    if isinstance(error, OSError):
        return f"the operating system refused: {text}"
    return (
        f"stopped by an unexpected {text}\nThis is a defect of tfprune or of a library below it. "
        "The same command with --debug shows where it happened; please report that."
    )


if __name__ == "__main__":
    raise SystemExit(main())
