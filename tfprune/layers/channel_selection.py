"""Channel selection: a reader of a shared stream takes some of its channels, the others stay.

In a pre-activation network or a DenseNet several batch normalisations read one tensor, each
followed by its own convolution. Removing a channel from the tensor takes it from all of them. A
*channel selection* in front of a batch normalisation lets each reader drop channels by itself.

While the network trains, a selection is a layer with one weight: a matrix from the channels of the
stream to those that the reader sees, at first the identity. To the channel graph it reads the
former and makes the latter, so that scores, plans, surgery and the oracle need to know nothing
more: surgery drops columns for what the reader gives up, and rows for what leaves the stream.
:func:`without_selections` then puts plain ``keras.ops.take`` with constant indices in its place:
one GATHER in LiteRT, which its GPU accelerator runs (``benchmarks/selection_form.md`` compares it
with other forms), and nothing at all where every channel is read.

Reference: Z. Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV
2017, arXiv:1708.06519, and the authors' code, in which the selection stands behind the batch
normalisation. In front of it, it spares the normalisation too; the function is the same, as
normalisation and activation treat every channel by itself. Sheet A4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from tfprune.errors import ModelError
from tfprune.graph import RuleCall, rule
from tfprune.graph.labels import TensorLabels
from tfprune.graph.rewriting import Replace, rewritten
from tfprune.graph.trace import Call, Trace, is_sequential

_PREFIX = "select_for_"
# Between the layer that makes channels and the one that reads them: they see each channel alone.
_PASSING = ("MaxPooling2D", "AveragePooling2D", "ZeroPadding2D", "Dropout", "Activation", "ReLU")


@keras.saving.register_keras_serializable(package="tfprune")
class ChannelSelection(keras.layers.Layer):  # type: ignore[misc]
    """Takes channels, by a matrix of ones and zeros. :func:`with_selections` puts it in.

    Attributes:
        kernel: float32, shape ``(channels read, channels given)``, not trained: 1 where the output
            channel is the input channel.

    Args:
        units: how many channels it gives; ``None`` for as many as it reads.
        diagonal: the matrix has nothing outside its diagonal; surgery ends that.
    """

    def __init__(self, units: int | None = None, diagonal: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units = units
        self.diagonal = diagonal

    def build(self, input_shape: Any) -> None:
        """Makes the matrix, the identity where it is square."""
        channels = int(input_shape[-1])
        self.units = channels if self.units is None else self.units
        self.kernel = self.add_weight(
            name="kernel",
            shape=(channels, self.units),
            initializer=_identity,
            trainable=False,
            autocast=False,
        )
        self.built = True

    def call(self, inputs: Any) -> Any:
        """The selected channels. A diagonal matrix costs one product a channel."""
        kernel = ops.cast(self.kernel, inputs.dtype)
        if self.diagonal:
            return inputs * ops.diagonal(kernel)
        return ops.matmul(inputs, kernel)

    def get_config(self) -> dict[str, Any]:
        """The number of channels given, and whether each is the channel of the same number."""
        return {**super().get_config(), "units": self.units, "diagonal": self.diagonal}


def _identity(shape: Any, dtype: Any = None) -> Any:
    return ops.eye(shape[0], shape[1], dtype=dtype or "float32")


def channel_selection(call: RuleCall) -> TensorLabels:
    """Rows consume the stream's channels, columns produce the reader's."""
    labels = call.inputs[0]
    inputs, outputs = labels[-1], call.fresh(int(call.op.kernel.shape[-1]))
    call.weight(call.op.kernel, "kernel", consumes={0: inputs}, produces={1: outputs})
    call.size("units", outputs)
    if inputs is not None:
        read = inputs
        call.config(
            "diagonal",
            lambda keep: {"diagonal": call.op.diagonal and _same(keep(read), keep(outputs))},
        )
    return (*labels[:-1], outputs)


rule(ChannelSelection, channel_selection)


def _same(first: Any, second: Any) -> bool:
    return bool(np.array_equal(first, second))


def with_selections(model: Any) -> Any:
    """A copy of a model with a selection before every batch normalisation that reads a stream.

    A stream is a tensor that others read too, or that comes from joining tensors (addition,
    concatenation). A batch normalisation that alone follows a convolution needs none. The outputs
    are the same.

    Args:
        model: a functional Keras 3 model, channels last; nested models are looked through. A
            sequential model has no streams, and comes back as it is.

    Raises:
        ModelError: another kind of model, or one with channels first.
    """
    return model if is_sequential(model) else rewritten(model, _inserting)


def without_selections(model: Any) -> Any:
    """A copy of a model with ``keras.ops.take`` in the place of selections.

    Args:
        model: from :func:`with_selections`, or from surgery on one.
    """
    return rewritten(model, lambda _: _lowered)


def _inserting(traced: Trace) -> Replace:
    streams = {id(call.op) for call in traced.calls if _reads_stream(call, traced)}

    def replace(op: Any, copied: Callable[..., Any]) -> Any:
        new = copied(op)
        if id(op) not in streams:
            return new
        select = ChannelSelection(name=f"{_PREFIX}{op.name}", dtype=op.dtype_policy)
        return lambda tensor, **options: new(select(tensor), **options)

    return replace


def _reads_stream(call: Call, traced: Trace) -> bool:
    if type(call.op).__name__ != "BatchNormalization":
        return False
    read = Counter(ref.key for other in traced.calls for ref in other.inputs)
    read.update(ref.key for ref in traced.outputs)
    maker = {ref.key: other for other in traced.calls for ref in other.outputs}
    ref = call.inputs[0]
    while read[ref.key] == 1 and ref.key in maker:
        before = maker[ref.key]
        if type(before.op).__name__ not in _PASSING or len(before.inputs) != 1:
            return len(before.inputs) != 1
        ref = before.inputs[0]
    if ref.key not in maker:
        return False  # the model's own input, whose channels stay
    if call.op.axis not in (-1, len(call.inputs[0].shape) - 1):
        raise ModelError(
            "Expected a model with channels last, for channel selection. Received: batch "
            f"normalisation {call.op.name!r} over axis {call.op.axis}."
        )
    return True


def _lowered(op: Any, copied: Callable[..., Any]) -> Any:
    if not isinstance(op, ChannelSelection):
        return copied(op)
    kernel = np.asarray(op.kernel)
    if np.array_equal(kernel, np.eye(len(kernel))):
        return lambda tensor: tensor
    # What has left the stream and is still read is zero: a channel of zeros behind the others.
    gone = ~kernel.any(axis=0)
    indices = np.where(gone, len(kernel), kernel.argmax(axis=0)).astype(np.int32)

    def taken(tensor: Any) -> Any:
        if gone.any():
            widths = [(0, 0)] * (len(tensor.shape) - 1)
            tensor = ops.pad(tensor, [*widths, (0, 1)])
        return ops.take(tensor, indices, axis=-1)

    return taken
