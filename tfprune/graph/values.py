"""New values for weights (reconstruction): checked, fitted to a graph, and as arrays on disk.

The arrays of a plan stand in one ``.npz`` file beside its JSON, which names the file, its checksum,
and the shape and type of every array. Neither is trusted: the JSON may name a file in its own
folder only, arrays are neither compressed nor pickled, and no array is made before the file is
known to hold as many bytes as the JSON says.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from tfprune.errors import PlanError
from tfprune.graph.context import Record, Site
from tfprune.graph.labels import Keep

Array = NDArray[Any]

_TYPES = ("float16", "float32", "float64")
_SUFFIX = ".values.npz"
# Of an .npz file per array, besides its data: the headers of the .npy (128 bytes) and of the zip
# file, without the name, which stands there twice and has up to four bytes per character.
_OVERHEAD = 1024
_REMEDY = (
    "Copy both files of the plan, or save it again; to use the plan without the new values, take "
    'the entry "values" out of the JSON.'
)


def frozen(values: Mapping[str, Any]) -> dict[str, Array]:
    """Read-only copies, as floating-point arrays of NumPy.

    Raises:
        PlanError: an array of another type, or with values that are not finite.
    """
    if not isinstance(values, Mapping):
        raise PlanError(
            "Expected new values as a mapping from a weight's path, such as 'conv/kernel', to an "
            f"array. Received: {type(values).__name__}."
        )
    return {str(name): _frozen(str(name), value) for name, value in values.items()}


def _frozen(name: str, value: Any) -> Array:
    if _is_frozen(value):
        array: Array = value  # plans hand their arrays on
    else:
        try:
            array = np.array(np.asarray(value), order="C")
        except (TypeError, ValueError) as error:
            raise PlanError(
                f"Expected an array of new values for {name!r}. Received: "
                f"{type(value).__name__} ({error})."
            ) from error
    if array.dtype.name == "bfloat16":  # a type that files of NumPy do not know
        array = array.astype(np.float32)
    if array.dtype.name not in _TYPES:
        raise PlanError(
            f"Expected new values for {name!r} of type {', '.join(_TYPES)} or bfloat16. Received: "
            f"{array.dtype.name}. Convert them, say with numpy.asarray(values, 'float32')."
        )
    _check_finite(name, array)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    array.setflags(write=False)
    return array


def _is_frozen(value: Any) -> bool:
    """Whether it may have come from :func:`frozen`: nobody else holds it to write."""
    return (
        type(value) is np.ndarray
        and value.flags.owndata
        and value.flags.c_contiguous
        and not value.flags.writeable
    )


def _check_finite(name: str, array: Array, as_type: str = "") -> None:
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise PlanError(
            f"Expected finite new values for {name!r}. Received: {bad} of {array.size} that are "
            f"NaN or infinite{as_type}. A singular least-squares problem makes such; regularise "
            "it, or use more examples."
        )


def equal(first: Mapping[str, Array], second: Mapping[str, Array]) -> bool:
    """Whether the same weights get the same values."""
    return first.keys() == second.keys() and all(
        np.array_equal(value, second[name]) for name, value in first.items()
    )


# -- fitted to a graph -------------------------------------------------------------------------


def fitted(
    record: Record, keep: Keep, values: Mapping[str, Array], paths: Mapping[str, str]
) -> dict[str, Array]:
    """The values by the names of the labelled model, in its order, checked to fit.

    Args:
        record: what is known of the model.
        keep: which channels stay.
        values: new values by the names of the plan.
        paths: paths of the model -> paths of the plan.

    Raises:
        PlanError: a weight that is unknown, ambiguous, of integers, or from which its layer makes
            other arrays; a shape that does not fit; values that the weight's type cannot hold.
    """
    if not values:
        return {}
    sites: dict[str, list[Site]] = {}
    for site in record.sites.values():
        sites.setdefault(f"{paths.get(site.path, site.path)}/{site.name}", []).append(site)
    for name in values:
        if name not in sites:
            near = difflib.get_close_matches(name, sites, n=3, cutoff=0.5) or list(sites)[:3]
            raise PlanError(
                "Expected new values for weights that read, make or accompany channels, by the "
                f"path of the layer and the weight's name. Received: {name!r}, which the model has "
                f"not; it has {', '.join(map(repr, near))}. A Member's full_name is such a name."
            )
        if len(sites[name]) > 1:
            raise PlanError(
                f"Expected the name of one weight. Received: {name!r}, which {len(sites[name])} "
                "weights share. Give them different names in the rule of their layer."
            )
    adapted = {record.paths[key] for key in record.finishers}
    result: dict[str, Array] = {}
    for name, (site, *_) in sites.items():
        if name in values:
            _check_fit(site, name, keep, values[name], site.path in adapted)
            result[site.full_name] = values[name]
    return result


def _check_fit(site: Site, name: str, keep: Keep, value: Array, adapted: bool) -> None:
    if adapted:
        raise PlanError(
            f"Expected new values for weights that a layer computes with. Received: {name!r}, from "
            "which its layer made other arrays when it was adapted. Adapt the pruned model instead."
        )
    expected = pruned_shape(site, keep)
    if value.shape != expected:
        whole = tuple(int(size) for size in site.variable.shape)
        raise PlanError(
            f"Expected new values of shape {expected} for {name!r}: what the plan keeps of "
            f"{whole}. Received: shape {value.shape}. Give values for the kept channels only, in "
            "ascending order of their indices."
        )
    dtype = np.asarray(site.variable).dtype
    if not dtype.name.startswith(("float", "bfloat")):
        raise PlanError(
            f"Expected new values for floating-point weights. Received: {name!r}, which is of "
            f"type {dtype.name}. Leave it out."
        )
    with np.errstate(over="ignore"):
        _check_finite(name, value.astype(dtype), f" as {dtype.name}")


def pruned_shape(site: Site, keep: Keep) -> tuple[int, ...]:
    """The shape of a weight's kept part."""
    return tuple(
        int(size) if labels is None else int(keep(labels).sum())
        for size, labels in zip(site.variable.shape, site.labels, strict=True)
    )


# -- on disk -----------------------------------------------------------------------------------


def file_beside(target: Path) -> Path:
    """Where the arrays of the plan at ``target`` stand: ``plan.values.npz`` for ``plan.json``."""
    return target.with_name(target.stem + _SUFFIX)


def write_arrays(
    temporary: Path, name: str, values: Mapping[str, Array], kept: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Writes the arrays, as ``numpy.savez`` would; returns what the JSON has to say about them.

    The same values make the same file, byte by byte.
    """
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for weight, value in values.items():
            with archive.open(zipfile.ZipInfo(f"{weight}.npy"), "w", force_zip64=True) as file:
                little = value.astype(value.dtype.newbyteorder("<"), copy=False)
                npy.write_array(file, little, version=(1, 0), allow_pickle=False)
    with open(temporary, "rb") as written:
        checksum = hashlib.file_digest(written, "sha256").hexdigest()
    return {
        "file": name,
        "sha256": checksum,
        "channels": channels_digest(kept),
        "weights": {
            weight: {"shape": list(value.shape), "dtype": value.dtype.name}
            for weight, value in values.items()
        },
    }


def channels_digest(kept: Mapping[str, Sequence[int]]) -> str:
    """SHA-256 of the kept channels, in hex, 16 digits: new values are for these and no others."""
    plain = {name: sorted(int(i) for i in indices) for name, indices in kept.items()}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def read_arrays(path: Path, entry: Any, kept: Mapping[str, Sequence[int]]) -> dict[str, Array]:
    """The arrays that ``entry``, the part of a plan's JSON about them, asks for.

    Args:
        path: the JSON file, symbolic links followed.
        entry: untrusted.
        kept: the channels that the plan keeps.

    Raises:
        PlanError: the entry is damaged or made for other channels; the file is missing, damaged,
            of another plan, or has other arrays than the entry says.
    """
    try:
        file, checksum, channels = str(entry["file"]), str(entry["sha256"]), str(entry["channels"])
        expected = {
            str(name): (_shape(known["shape"]), _type(known["dtype"]))
            for name, known in entry["weights"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(
            'Expected an entry "values" with "file", "sha256", "channels" and "weights". '
            f"{str(path)!r} is damaged: {type(error).__name__}: {error}. {_REMEDY}"
        ) from error
    if Path(file).name != file or not file.endswith(".npz") or set(file) & set("/\\:\0"):
        raise PlanError(
            "Expected the arrays of a plan in an .npz file of the same folder, named without it. "
            f"{str(path)!r} asks for {file!r}; make the plan again."
        )
    if channels != channels_digest(kept):
        raise PlanError(
            f"Expected the kept channels that the new values were made for. In {str(path)!r} they "
            'have been edited. Make the plan again, or take the entry "values" out of the JSON.'
        )
    content = _content(path.with_name(file), expected)
    if hashlib.sha256(content).hexdigest() != checksum:
        raise _damaged(path.with_name(file), "is damaged or belongs to another plan")
    try:
        return _parse(content, expected, path.with_name(file))
    except PlanError:
        raise
    except Exception as error:  # whatever zipfile and NumPy make of a crafted file
        raise _damaged(
            path.with_name(file), f"is damaged ({type(error).__name__}: {error})"
        ) from error


_Expected = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]


def _content(file: Path, expected: _Expected) -> bytes:
    """The bytes of the file; no more of them than the expected arrays can take."""
    least = sum(math.prod(shape) * dtype.itemsize for shape, dtype in expected.values())
    most = least + sum(_OVERHEAD + 8 * len(name) for name in expected) + _OVERHEAD
    if not file.is_file():
        raise _damaged(file, "is not there")
    try:
        with open(file, "rb") as stream:
            held = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            content = stream.read(most + 1) if least <= held <= most else b""
    except OSError as error:
        raise _damaged(file, f"cannot be read ({error.strerror or error})") from error
    if not least <= held <= most:
        raise _damaged(
            file,
            f"has {held:,} bytes, where its arrays take {least:,}: it is cut off or belongs to "
            "another plan",
        )
    return content


def _parse(content: bytes, expected: _Expected, file: Path) -> dict[str, Array]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(archive.infolist()) > len(members):
            raise _damaged(file, "has an array twice")
        missing, extra = expected.keys() - members.keys(), members.keys() - expected.keys()
        for names, what in ((missing, "lacks"), (extra, "has an array too many:")):
            if names:
                raise _damaged(file, f"{what} {min(names)!r}")
        return {
            name: _array(archive, members[name], shape, dtype)
            for name, (shape, dtype) in expected.items()
        }


def _array(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Array:
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("a compressed array")
    with archive.open(info) as stream:
        if npy.read_magic(stream) != (1, 0):
            raise ValueError("another version of the .npy format")
        found, fortran, kind = npy.read_array_header_1_0(stream)
        if fortran or found != shape or kind != dtype:
            raise ValueError(f"expected {dtype.name} {shape}, found {kind.name} {found}")
        data = stream.read()
    return np.frombuffer(data, dtype).reshape(shape)


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or len(value) > 32:
        raise ValueError(f"expected a shape, found {str(value)[:60]}")
    for size in value:
        if isinstance(size, bool) or not isinstance(size, int) or not 0 < size < 2**48:
            raise ValueError(f"expected the size of an axis, found {str(size)[:60]}")
    return tuple(value)


def _type(value: Any) -> np.dtype[Any]:
    if value not in _TYPES:
        raise ValueError(f"expected one of {', '.join(_TYPES)}, found {str(value)[:60]}")
    found: np.dtype[Any] = np.dtype(value).newbyteorder("<")
    return found


def _damaged(file: Path, what: str) -> PlanError:
    return PlanError(
        f"Expected the file with the arrays of the plan beside it. {str(file)!r} {what}. {_REMEDY}"
    )
