"""Many independent tasks on one model: here, in other processes, or on other machines.

An executor is whatever implements :class:`concurrent.futures.Executor`: a ``ThreadPoolExecutor``, a
``ProcessPoolExecutor`` (with the start method "spawn"; TensorFlow does not survive a fork), or a
Dask cluster's ``distributed.Client(...).get_executor()``. ``None`` does the work here, by the same
code. The numbers are the same, wherever the work is done.

What all tasks share (a model, arrays) is pickled once. It goes along with every call of the
executor, and a worker opens it once: each of its threads keeps what it opened last. Models travel
as the bytes of a ``.keras`` file, which is opened as any other file is: in Keras's safe mode. The
workers need the same versions of Python, Keras and tfprune.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import pickle
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from tfprune.batches import iterate
from tfprune.errors import ArgumentError, TfpruneError
from tfprune.graph.copying import copy_model
from tfprune.graph.trace import all_layers, is_of_framework, trace
from tfprune.loading import load_model

Task = TypeVar("Task")
Result = TypeVar("Result")

_CALLS = 64
"""Into how many calls tasks are divided at most, unless the caller says otherwise."""

_KEPT = 2
"""How many shared things a worker's thread keeps open."""


class Shared(Protocol):
    """What all tasks of a run have in common; it can be pickled."""

    def open(self) -> Any:
        """What the tasks work on, made once per worker."""
        ...


def run_tasks(
    executor: Executor | None,
    function: Callable[[Any, Task], Result],
    shared: Shared,
    tasks: Sequence[Task],
    *,
    per_call: int | None = None,
    in_flight: int = 32,
) -> Generator[tuple[int, Result], None, None]:
    """Applies a function to every task, wherever the executor works.

    Args:
        executor: where; ``None`` for here.
        function: called with what ``shared.open()`` returned and a task. A module's own function
            (for other processes it is sent by name), whose result depends on these two alone:
            neither on other tasks nor on their order.
        shared: what all tasks have in common.
        tasks: can be pickled.
        per_call: tasks that go together in one call of the executor, in order; by default as many
            as make 64 calls. What is shared goes along with each call.
        in_flight: calls that run or wait at a time. More workers than that are not kept busy.

    Yields:
        The number of a task and its result, as calls are completed; those that are complete at
        the same time in the order of the tasks.

    Raises:
        ArgumentError: no executor, or one that forks; something that cannot be pickled, or a model
            that cannot be saved and loaded. All of it at the call, before any work.
        Exception: of the first task that fails. Whatever ends the work early, an interrupt
            included, cancels the calls that have not begun. The executor stays open.
    """
    check_executor(executor)
    if executor is None:
        return _here(function, shared, tasks)
    size = per_call or max(1, math.ceil(len(tasks) / _CALLS))
    return _elsewhere(executor, function, _packed(shared), tasks, size, in_flight)


def check_executor(executor: Any) -> None:
    """Raises :class:`ArgumentError` unless ``executor`` is ``None`` or one that will do."""
    if executor is None:
        return
    if isinstance(executor, type) or not isinstance(executor, Executor):
        received = executor.__name__ if isinstance(executor, type) else type(executor).__name__
        raise ArgumentError(
            "Expected an executor: a concurrent.futures.Executor, or None for this process. "
            f"Received: {received}. For a Dask cluster, pass client.get_executor()."
        )
    context = getattr(executor, "_mp_context", None)
    if context is not None and context.get_start_method() == "fork":
        raise ArgumentError(
            "Expected processes that are started afresh. Received: a process pool that forks, "
            "in which TensorFlow hangs. Write ProcessPoolExecutor(n, "
            "mp_context=multiprocessing.get_context('spawn'))."
        )


def _here(
    function: Callable[[Any, Task], Result], shared: Shared, tasks: Sequence[Task]
) -> Generator[tuple[int, Result], None, None]:
    if not tasks:
        return
    opened = shared.open()
    for number, task in enumerate(tasks):
        yield number, function(opened, task)


def _elsewhere(
    executor: Executor,
    function: Callable[[Any, Task], Result],
    content: bytes,
    tasks: Sequence[Task],
    per_call: int,
    in_flight: int,
) -> Generator[tuple[int, Result], None, None]:
    digest = hashlib.sha256(content).hexdigest()
    starts = iter(range(0, len(tasks), per_call))
    running: dict[Future[list[Result]], int] = {}
    try:
        while True:
            for start in islice(starts, in_flight - len(running)):
                some = list(tasks[start : start + per_call])
                running[executor.submit(_call, function, digest, content, some)] = start
            if not running:
                return
            done = wait(running, return_when=FIRST_COMPLETED).done
            # Results first, so that of what is complete nothing is lost to a failure beside it.
            for future in sorted(done, key=lambda future: (_failed(future), running[future])):
                start = running.pop(future)
                yield from enumerate(future.result(), start)
    finally:
        for future in running:
            future.cancel()


def _failed(future: Future[Any]) -> bool:
    return future.cancelled() or future.exception() is not None


def _packed(shared: Shared) -> bytes:
    try:
        return pickle.dumps(shared, protocol=pickle.HIGHEST_PROTOCOL)
    except TfpruneError:
        raise
    # Pickling runs the classes' own code, and so raises nearly anything.
    except Exception as error:
        raise ArgumentError(
            "Expected arguments that can be sent to other processes. Received: one that cannot be "
            f"pickled ({type(error).__name__}: {error}). Write functions at the top level of a "
            "module, or leave executor out."
        ) from error


_local = threading.local()


def _call(
    function: Callable[[Any, Task], Result], digest: str, content: bytes, tasks: Sequence[Task]
) -> list[Result]:
    """What a worker does."""
    # By thread: a model is masked and unmasked while it is measured.
    opened: OrderedDict[str, Any] = _local.__dict__.setdefault("opened", OrderedDict())
    if digest not in opened:
        while len(opened) >= _KEPT:
            opened.popitem(last=False)
        opened[digest] = pickle.loads(content).open()
    opened.move_to_end(digest)
    return [function(opened[digest], task) for task in tasks]


class PortableModel:
    """A model that can be pickled: as the bytes of its ``.keras`` file, uncompiled.

    Attributes:
        model: of Keras 3 or tf_keras; in the process that made this, the very model given.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __reduce__(self) -> tuple[Any, ...]:
        try:
            content = _saved(self.model)
            again = _loaded(content)
            same = len(again.weights) == len(self.model.weights) and all(
                np.array_equal(np.asarray(new), np.asarray(old))
                for new, old in zip(again.weights, self.model.weights, strict=True)
            )
        # Saving and loading run the layers' own code, which raises nearly anything.
        except Exception as error:
            raise ArgumentError(
                "Expected a model that can be sent to other processes: saved as a .keras file and "
                f"loaded again in safe mode. Received: {self.model.name!r}, which cannot "
                f"({type(error).__name__}: {error}). Leave executor out, to work in this process."
            ) from error
        if not same:
            raise ArgumentError(
                "Expected a model that can be sent to other processes. Received: "
                f"{self.model.name!r}, which has other weights when it is saved and loaded again. "
                "Leave executor out, to work in this process."
            )
        return _received, (_modules(self.model), content)


def _saved(model: Any) -> bytes:
    # The copy is not compiled: optimizer and losses stay here.
    copy = copy_model(model)
    with tempfile.TemporaryDirectory(prefix="tfprune-") as folder:
        file = Path(folder) / "model.keras"
        copy.save(file)
        return file.read_bytes()


def _loaded(content: bytes) -> Any:
    with tempfile.TemporaryDirectory(prefix="tfprune-") as folder:
        file = Path(folder) / "model.keras"
        file.write_bytes(content)
        return load_model(file)


def _received(modules: Sequence[str], content: bytes) -> PortableModel:
    for name in modules:
        importlib.import_module(name)
    return PortableModel(_loaded(content))


def _modules(model: Any) -> list[str]:
    """The modules that register the model's own classes, for a process that starts afresh."""
    parts = [*all_layers(model), *(call.op for call in trace(model).calls)]
    classes = {type(part) for part in parts if not is_of_framework(type(part))}
    return sorted({cls.__module__ for cls in classes} - {"__main__", "__mp_main__"})


@dataclass(frozen=True, eq=False)
class Examples:
    """Data read into arrays, which can be pickled.

    Attributes:
        x: an array, or a list or dictionary of arrays.
        y: labels, likewise, or ``None``.
        batch_size: of the batches that they are read in again.
    """

    x: Any
    y: Any
    batch_size: int

    @property
    def data(self) -> Any:
        """The arrays as every function takes them: ``(x, y)``, or ``x`` alone."""
        return self.x if self.y is None else (self.x, self.y)

    def batches(self) -> Iterator[tuple[Any, Any]]:
        """The batches, in order."""
        return iterate(self.data, batch_size=self.batch_size)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything, in hex, 16 digits."""
        return digest_of([self.x, self.y, self.batch_size])


def gather(
    data: Any,
    *,
    batches: int | None = None,
    batch_size: int = 128,
    labels: bool = False,
    input_shape: Any = None,
) -> Examples:
    """Reads data once into arrays; arguments and errors as :func:`tfprune.batches.iterate`.

    A dataset's batches stay as they are if all have one size, as ``batch`` makes them; otherwise
    they are cut anew to the size of the first.
    """
    pairs = list(
        iterate(data, batch_size=batch_size, limit=batches, labels=labels, input_shape=input_shape)
    )
    x = _joined([x for x, _ in pairs])
    y = None if pairs[0][1] is None else _joined([y for _, y in pairs])
    return Examples(x, y, len(_first(pairs[0][0])))


def digest_of(structure: Any) -> str:
    """SHA-256 of nested lists and dictionaries of arrays, numbers and texts; hex, 16 digits."""
    state = hashlib.sha256()

    def feed(part: Any) -> None:
        if isinstance(part, Mapping):
            state.update(f"{{{len(part)}".encode())
            for key in sorted(part):
                feed(str(key))
                feed(part[key])
        elif isinstance(part, list | tuple):
            state.update(f"[{len(part)}".encode())
            for item in part:
                feed(item)
        elif isinstance(part, np.ndarray):
            state.update(f"<{part.dtype.str}{part.shape}".encode())
            state.update(np.ascontiguousarray(part).tobytes())
        else:
            state.update(f"({part!r}".encode())

    feed(structure)
    return state.hexdigest()[:16]


def _first(part: Any) -> Any:
    if isinstance(part, Mapping):
        return next(iter(part.values()))
    return part[0] if isinstance(part, list) else part


def _joined(parts: Sequence[Any]) -> Any:
    """Batches of one structure put together."""
    if isinstance(parts[0], Mapping):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    if isinstance(parts[0], list):
        return [_joined(column) for column in zip(*parts, strict=True)]
    return np.concatenate(parts)
