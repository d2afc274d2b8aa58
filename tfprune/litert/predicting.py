"""Runs LiteRT models on data, as a phone's CPU would, for accuracies and comparisons."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from tfprune.errors import DataError, ModelError
from tfprune.litert.benchmarking import content_of
from tfprune.litert.check import to_floats, to_integers
from tfprune.litert.convert import convert
from tfprune.litert.examples import Array
from tfprune.litert.flatbuffer import read_graph
from tfprune.litert.keras_model import InputShape, keras_model
from tfprune.litert.quiet import captured_output


def to_litert(model: Any, *, input_shape: InputShape | None = None) -> bytes:
    """The float32 LiteRT form of a Keras model, batch size 1, in memory.

    Raises:
        ModelError, ArgumentError, ExportError: as :func:`tfprune.export`.
    """
    return convert(keras_model(model, input_shape=input_shape))


class Predictor:
    """A LiteRT model with one input and one output, ready to be run on batches.

    Args:
        model: the path of a LiteRT file, or its bytes.
        threads: CPU threads.

    Raises:
        ModelError: it has several inputs or outputs, or LiteRT refuses it.
        ArgumentError: there is no such file.
    """

    def __init__(self, model: str | os.PathLike[str] | bytes, *, threads: int = 2) -> None:
        from ai_edge_litert.interpreter import Interpreter

        content = content_of(model)
        graph = read_graph(content)
        if len(graph.inputs) != 1 or len(graph.outputs) != 1:
            raise ModelError(
                f"Expected a model with one input and one output. Received: {len(graph.inputs)} "
                f"inputs and {len(graph.outputs)} outputs."
            )
        self._input, self._output = graph.inputs[0], graph.outputs[0]
        try:
            with captured_output():
                self._interpreter = Interpreter(model_content=content, num_threads=threads)
                self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise ModelError(
                f"Expected a LiteRT model that runs here. LiteRT refuses it: {error}"
            ) from error

    def __call__(self, examples: Any) -> Array:
        """The outputs for a batch, float32, shape ``(examples, ...)``.

        Raises:
            DataError: the examples do not fit the model's input.
        """
        x = np.asarray(examples)
        expected = self._input.shape
        if tuple(x.shape[1:]) != tuple(expected[1:]):
            raise DataError(
                f"Expected examples of shape {tuple(expected[1:])}. Received: {tuple(x.shape[1:])}."
            )
        size = expected[0]
        padded = np.concatenate([x, np.repeat(x[-1:], -len(x) % size, axis=0)])
        source = self._interpreter.get_input_details()[0]["index"]
        target = self._interpreter.get_output_details()[0]["index"]
        rows = []
        for start in range(0, len(padded), size):
            batch = to_integers(padded[start : start + size], self._input)
            self._interpreter.set_tensor(source, batch.astype(self._input.dtype))
            self._interpreter.invoke()
            rows.append(to_floats(self._interpreter.get_tensor(target).copy(), self._output))
        return np.concatenate(rows)[: len(x)]
