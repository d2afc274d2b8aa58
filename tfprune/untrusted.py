"""What a model file says of itself, read before anything in it is made real.

Keras 3 loads files in its safe mode. tf_keras has none for ``.h5`` files and imports whatever
module a configuration names, so that its files are looked through here first.
"""

from __future__ import annotations

import builtins
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tfprune.errors import ModelError

# TensorFlow functions that reach outside the model: files, Python code, other libraries.
_REACHING_OUT = frozenset(
    {
        *("io", "train", "summary", "data", "profiler", "distribute", "debugging", "saved_model"),
        *("raw_ops", "py_function", "py_func", "numpy_function"),
        *("load_library", "load_op_library"),
    }
)


def read_config(file: Path) -> Any:
    """The model's configuration, as JSON holds it.

    Raises:
        ModelError: the file is damaged, or holds weights only.
    """
    try:
        text = _of_archive(file) if file.suffix == ".keras" else _of_hdf5(file)
        config = None if text is None else json.loads(text)
    # A damaged archive surfaces as any of these; the zip and HDF5 readers declare no more.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        kind = "a .keras archive" if file.suffix == ".keras" else "an HDF5 file"
        raise ModelError(
            f"Expected {kind}. Received: {str(file)!r}, which is damaged or of another kind "
            f"({_first_line(error)}). If it was cut off while being copied, copy it again."
        ) from error
    if not isinstance(config, dict):
        raise ModelError(
            f"Expected a whole model. Received: {str(file)!r}, which holds weights only. Build "
            "the model, load_weights, and save it with model.save('model.keras')."
        )
    return config


def holds_lambda(config: Any) -> bool:
    """Whether there is Python code in the configuration: a Lambda layer or a lambda."""
    return any(part.get("class_name") in ("Lambda", "__lambda__") for part in _parts(config))


def custom_classes(config: Any) -> list[str]:
    """Names of the classes that are neither Keras's nor tf_keras's, as far as the file tells."""
    names = [
        str(part["class_name"])
        for part in _parts(config)
        if "class_name" in part
        and "module" in part
        and part["class_name"] != "function"
        and not _of_keras(part["module"])
        and part["module"] != "builtins"
    ]
    return list(dict.fromkeys(names))


def unsafe_for_keras2(config: Any) -> str | None:
    """In words, what in the configuration tf_keras would import or call from elsewhere."""
    for part in _parts(config):
        module, name = part.get("module"), part.get("class_name")
        if name == "function":
            function = part.get("config")
            plain = module == "builtins" and not hasattr(builtins, str(function))
            if not plain and not (_of_keras(module) and str(module).endswith("activations")):
                return f"the function {module}.{function}"
        elif "class_name" in part and module is not None and not _of_keras(module):
            return f"the class {module}.{name}"
        if name == "TFOpLambda":
            inner = part.get("config")
            symbol = str(inner.get("function")) if isinstance(inner, dict) else ""
            if _REACHING_OUT & set(symbol.split(".")):
                return f"the TensorFlow function {symbol}"
    return None


def has_keras2_operations(config: Any) -> bool:
    """Whether there are TensorFlow operations that only tf_keras can make into layers."""
    kinds = ("TFOpLambda", "SlicingOpLambda", "ClassMethod", "InstanceProperty", "InstanceMethod")
    return any(part.get("class_name") in kinds for part in _parts(config))


def made_by_keras2(config: Any) -> bool:
    """Whether a ``.keras`` file was written by tf_keras."""
    return str(config.get("module", "")).startswith("tf_keras")


def _of_archive(file: Path) -> str:
    with zipfile.ZipFile(file) as archive:
        return archive.read("config.json").decode("utf-8")


def _of_hdf5(file: Path) -> str | None:
    import h5py

    with h5py.File(file, "r") as archive:
        text = archive.attrs.get("model_config")
    return text.decode("utf-8") if isinstance(text, bytes) else text


def _of_keras(module: Any) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in ("keras", "tf_keras")


def _parts(config: Any) -> Iterator[dict[str, Any]]:
    """All dictionaries in nested dictionaries and lists."""
    if isinstance(config, dict):
        yield config
        for value in config.values():
            yield from _parts(value)
    elif isinstance(config, list):
        for item in config:
            yield from _parts(item)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
