"""Which weights of a model stay: one array of truth values per prunable weight."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.errors import ArgumentError
from tfprune.layers.distribution import strategy_scope
from tfprune.layers.prunable import prunable_weights
from tfprune.writing import replacing, writable_target

Mask = NDArray[np.bool_]

_FORMAT = "tfprune masks 1"
_PREFIX = "mask:"


@dataclass(frozen=True, eq=False)
class Masks(Mapping[str, Mask]):
    """For every prunable weight of a model, which of its elements stay.

    A mapping from the weight's path, as :func:`tfprune.layers.prunable_weights` has it
    (``"block/conv1/kernel"``), to a read-only array of the weight's shape: ``True`` stays,
    ``False`` is zero. It holds copies, so that nothing changes it later.

    Args:
        arrays: path -> array of truth values, or of numbers 0 and 1.

    Raises:
        ArgumentError: no mapping, no path, or an array with other values.

    Example:
        >>> masks = Masks({"dense/kernel": [[1, 0], [1, 1]]})
        >>> masks.sparsity
        0.25
    """

    arrays: Mapping[str, Mask]

    def __post_init__(self) -> None:
        if not isinstance(self.arrays, Mapping):
            raise ArgumentError(
                "Expected masks as a mapping from the path of a weight to an array. "
                f"Received: {type(self.arrays).__name__}."
            )
        copies = {path: _mask(path, array) for path, array in self.arrays.items()}
        object.__setattr__(self, "arrays", MappingProxyType(copies))

    @classmethod
    def ones(cls, model: Any) -> Masks:
        """Masks under which every weight stays.

        Raises:
            ModelError: no built Keras 3 model, or an unknown layer in it.
        """
        return cls.over(model, {})

    @classmethod
    def over(cls, model: Any, arrays: Mapping[str, Any]) -> Masks:
        """Masks for a model: those given, and ones for the weights that are not named.

        Raises:
            ArgumentError: a path that the model does not have, or another shape.
            ModelError: as :meth:`ones`.
        """
        full: dict[str, Any] = {
            path: np.ones(tuple(variable.shape), np.bool_)
            for path, variable in prunable_weights(model).items()
        }
        masks = cls(full | dict(arrays))
        masks.check(model)
        return masks

    @classmethod
    def of_zeros(cls, model: Any) -> Masks:
        """Masks that are ``False`` where a weight of the model is exactly zero.

        Raises:
            ModelError: as :meth:`ones`.
        """
        return cls(
            {path: np.asarray(variable) != 0 for path, variable in prunable_weights(model).items()}
        )

    def __getitem__(self, path: str) -> Mask:
        return self.arrays[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        return set(self) == set(other) and all(np.array_equal(self[p], other[p]) for p in self)

    def __and__(self, other: Masks) -> Masks:
        """Masks under which stays what stays under both.

        Raises:
            ArgumentError: the two are not of one model.
        """
        if not isinstance(other, Masks):
            return NotImplemented
        _require_fit({path: mask.shape for path, mask in self.items()}, other)
        return Masks({path: mask & other[path] for path, mask in self.items()})

    def __repr__(self) -> str:
        return (
            f"Masks({len(self)} weights, {self.kept:,} of {self.count:,} elements kept, "
            f"sparsity {self.sparsity:.4f})"
        )

    @property
    def count(self) -> int:
        """The number of elements, kept or not."""
        return sum(mask.size for mask in self.values())

    @property
    def kept(self) -> int:
        """The number of elements that stay."""
        return sum(int(np.count_nonzero(mask)) for mask in self.values())

    @property
    def sparsity(self) -> float:
        """The fraction of elements that are zero, over all weights; 0 if there are none."""
        return (self.count - self.kept) / self.count if self.count else 0.0

    @property
    def sparsities(self) -> dict[str, float]:
        """The fraction of zeros in each weight, by its path."""
        return {path: float(1 - mask.mean()) if mask.size else 0.0 for path, mask in self.items()}

    @property
    def empty(self) -> list[str]:
        """The paths of weights of which nothing stays."""
        return [path for path, mask in self.items() if not mask.any()]

    def check(self, model: Any) -> None:
        """Whether these are masks for all prunable weights of a model, and for no others.

        Raises:
            ArgumentError: a mask that does not fit, naming weight and shapes; paths that the model
                does not have, or weights without a mask.
            ModelError: as :meth:`ones`.
        """
        shapes = {path: tuple(variable.shape) for path, variable in prunable_weights(model).items()}
        _require_fit(shapes, self)

    def apply(self, model: Any) -> Any:
        """A plain copy of a model in which the masked weights are zero.

        Args:
            model: a Keras 3 model, wrapped for pruning or not. It stays as it is.

        Returns:
            A new, uncompiled model without wrappers.

        Raises:
            ArgumentError: as :meth:`check`.
            ModelError: as :meth:`ones`.
        """
        from tfprune.layers.wrapping import strip_pruning

        self.check(model)
        copy = strip_pruning(model)
        self.zero(copy)
        return copy

    def zero(self, model: Any) -> None:
        """Makes the masked weights of this very model zero, *in place*.

        Nothing holds them at zero in later training: see :func:`tfprune.layers.with_masks`.

        Raises:
            ArgumentError: as :meth:`check`.
            ModelError: as :meth:`ones`.
        """
        self.check(model)
        with strategy_scope(model):
            for path, variable in prunable_weights(model).items():
                value = np.asarray(variable)
                # not a product, which leaves the NaN of a weight that went astray
                variable.assign(np.where(self[path], value, np.zeros((), value.dtype)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a NumPy archive (.npz), whole or not at all.

        Raises:
            ArgumentError, FileError: the place cannot be written.
        """
        target = writable_target(path)
        content: dict[str, Any] = {_PREFIX + name: mask for name, mask in self.items()}
        with replacing(target) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, format=np.array(_FORMAT), **content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """Reads what :meth:`save` wrote. Nothing in the file is executed.

        Raises:
            ArgumentError: no such file, a damaged one, or one of another kind.
        """
        try:
            # opened here, because numpy leaves a damaged file open
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                if str(archive["format"]) != _FORMAT:
                    raise ValueError(f"its format is {archive['format']!s}, not {_FORMAT!r}")
                arrays = {
                    name.removeprefix(_PREFIX): archive[name]
                    for name in archive.files
                    if name.startswith(_PREFIX)
                }
        # What the readers of zip archives and arrays raise for damaged or foreign files; a file
        # that is no archive is an array, or text, to numpy.
        except (
            OSError, ValueError, KeyError, IndexError, EOFError, TypeError, AttributeError,
            zipfile.BadZipFile, zlib.error,
        ) as error:  # fmt: skip
            raise ArgumentError(
                f"Expected a file written by Masks.save. Received: {os.fspath(path)!r}, which "
                f"cannot be read as one ({type(error).__name__}: {error})."
            ) from error
        return cls(arrays)


def _mask(path: Any, array: Any) -> Mask:
    if not isinstance(path, str):
        raise ArgumentError(
            f"Expected the paths of weights, such as 'conv1/kernel'. Received: {path!r}."
        )
    given = np.asarray(array)
    if given.dtype != np.bool_ and not (given.dtype.kind in "iuf" and np.isin(given, (0, 1)).all()):
        raise ArgumentError(
            f"Expected the mask of {path!r} to hold True and False, or 1 and 0. Received: an "
            f"array of {given.dtype}"
            + (" with other values." if given.dtype.kind in "iuf" else ".")
        )
    copy = given.astype(np.bool_)
    copy.flags.writeable = False
    return copy


def _require_fit(shapes: Mapping[str, tuple[int, ...]], masks: Masks) -> None:
    for path, mask in masks.items():
        if path in shapes and shapes[path] != mask.shape:
            raise ArgumentError(
                f"Expected a mask of shape {shapes[path]} for the weight {path!r}. "
                f"Received: a mask that does not fit, of shape {mask.shape}."
            )
    unknown = [path for path in masks if path not in shapes]
    if unknown:
        raise ArgumentError(
            f"Expected masks for the weights {_listed(shapes)}. Received: masks that do not fit, "
            f"for {_listed(unknown)} besides."
        )
    missing = [path for path in shapes if path not in masks]
    if missing:
        raise ArgumentError(
            f"Expected a mask for each of the weights {_listed(shapes)}. Received: none for "
            f"{_listed(missing)}. Masks.over(model, masks) fills in ones."
        )


def _listed(paths: Any, most: int = 6) -> str:
    names = [repr(path) for path in paths]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "(none)") + more
