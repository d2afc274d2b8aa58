"""A file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from tfprune.errors import ArgumentError, FileError


def writable_target(path: str | os.PathLike[str]) -> Path:
    """Checks, before any long work, that a file can be written at ``path``.

    Args:
        path: Where the file is to be. A symbolic link is followed.

    Returns:
        The absolute path.

    Raises:
        ArgumentError: ``path`` is not a path, is a directory, or its directory does not exist.
        FileError: The directory or the file that stands there does not allow writing.
    """
    try:
        target = Path(os.path.realpath(os.fspath(path)))
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"Expected the path of the file to write, such as 'model.tflite'. Received: {path!r}."
        ) from error
    if target.is_dir():
        raise ArgumentError(
            f"Expected the path of a file. Received a directory: {os.fspath(path)!r}. "
            "Add a file name, such as 'model.tflite'."
        )
    if not target.parent.is_dir():
        raise ArgumentError(
            f"Expected a path in a directory that exists. Received: {os.fspath(path)!r}, "
            f"and {str(target.parent)!r} is not a directory. Create it first."
        )
    if target.exists() and not os.access(target, os.W_OK):
        raise FileError(
            f"Cannot write {str(target)!r}: the file there is read-only. "
            "Change its permissions or choose another path."
        )
    # Asking the file system is the only sure test: the superuser passes every access check.
    with replacing(target, keep=False):
        pass
    return target


@contextlib.contextmanager
def replacing(target: Path, *, keep: bool = True) -> Iterator[Path]:
    """A temporary file beside ``target`` that takes its place when the block ends well.

    Whatever ends the block early, an interrupt included, removes the temporary file and leaves
    what stood at ``target`` untouched.

    Args:
        target: The absolute path of the file to write.
        keep: Whether to replace ``target`` at the end; False only tries that it could be done.

    Yields:
        The path of the empty temporary file.

    Raises:
        FileError: The file system refuses.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        # not tempfile.mkstemp: its files are private to the user, whatever the umask says
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        yield temporary
        if keep:
            os.replace(temporary, target)
    except OSError as error:
        raise FileError(
            f"Cannot write {str(target)!r}: {error.strerror or error}. "
            "Choose a path on a file system with free space that allows writing."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
