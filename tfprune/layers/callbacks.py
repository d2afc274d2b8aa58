"""The callbacks that go with the pruning wrapper."""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any

import keras
import numpy as np

from tfprune.errors import ArgumentError, ModelError
from tfprune.graph.trace import framework_of
from tfprune.layers.distribution import strategy_scope
from tfprune.layers.prunable import is_wrapper, walk, wrappers_of
from tfprune.schedules.tfmot import load

_HOOKS = (
    "on_epoch_begin",
    "on_epoch_end",
    "on_train_begin",
    "on_train_end",
    "on_train_batch_begin",
    "on_train_batch_end",
    "on_test_begin",
    "on_test_end",
    "on_test_batch_begin",
    "on_test_batch_end",
    "on_predict_begin",
    "on_predict_end",
    "on_predict_batch_begin",
    "on_predict_batch_end",
)


class UpdatePruningStep(keras.callbacks.Callback):  # type: ignore[misc]
    """Starts the step counters of pruning wrappers, and masks the weights after every epoch.

    Training a wrapped model needs it: without it the first training call raises. A counter that
    is running already, as in a model loaded from a file, goes on. With a tf_keras model it is
    tfmot's callback of the same name.

    In a training loop of your own call ``set_model(model)`` and ``on_train_begin()`` before the
    first step, and ``on_epoch_end(epoch)`` after every epoch.

    Under ``tf.distribute.MirroredStrategy`` make the wrapped model in the strategy's scope. Under
    ``MultiWorkerMirroredStrategy`` with several workers Keras 3's own ``fit`` fails ("Attempt to
    convert a value (PerReplica...)", Keras issue 20585), wrapped or not: there write the loop with
    ``strategy.run``, on every worker with these three calls.
    """

    def set_model(self, model: Any) -> None:
        """Takes the model that is to be trained."""
        super().set_model(model)
        if framework_of(model) == "tf_keras":
            become(self, load().sparsity.keras.UpdatePruningStep(), model)

    def on_train_begin(self, logs: Any = None) -> None:
        """Sets the counters that no training has moved to 0.

        Raises:
            ArgumentError: in a training loop of your own, without ``set_model`` before.
        """
        if self.model is None:
            raise ArgumentError(
                "Expected a model to train. Received: none. Call set_model(model) of "
                "UpdatePruningStep before its on_train_begin()."
            )
        wrappers = wrappers_of(self.model)
        if not wrappers:
            warnings.warn(
                f"UpdatePruningStep has nothing to do: {self.model.name!r} has no pruning "
                "wrappers. Train what tfprune.prune_low_magnitude(model) returns.",
                stacklevel=2,
            )
        with strategy_scope(self.model):
            for wrapper in wrappers:
                wrapper.start()

    def on_epoch_end(self, epoch: int = 0, logs: Any = None, **kwargs: Any) -> None:
        """Masks the weights: the optimizer's last step has filled some.

        tfmot calls the first argument ``batch``; that name is taken too.

        Raises:
            ModelError: no wrapper was ever called in training, so that nothing is pruned.
        """
        wrappers = wrappers_of(self.model)
        if wrappers and not any(wrapper.called_in_training for wrapper in wrappers):
            raise ModelError(
                f"Expected training calls of the wrapped layers. Received: none in {self.model!r}, "
                "so nothing is pruned. Call the model with training=True. In a model of a class of "
                "your own, let call() take an argument training: without it Keras does not say "
                "that it trains."
            )
        with strategy_scope(self.model):
            for wrapper in wrappers:
                if wrapper.built:
                    wrapper.mask_weights()


class PruningSummaries(keras.callbacks.TensorBoard):  # type: ignore[misc]
    """A TensorBoard callback that also logs the sparsity and threshold of every mask.

    Scalars ``<path>/mask/sparsity`` (fraction of zeros) and ``<path>/threshold/threshold``
    (magnitude below which weights are masked), at the start of every epoch, over the optimizer's
    iterations, in ``<log_dir>/metrics``. With a tf_keras model it is tfmot's callback of the same
    name.

    Args:
        log_dir: a non-empty path.
        update_freq: as for ``keras.callbacks.TensorBoard``.
        **kwargs: of ``keras.callbacks.TensorBoard``.

    Raises:
        ArgumentError: ``log_dir`` is no path or empty.
        ImportError: TensorBoard is not installed; TensorFlow no longer brings it.
    """

    def __init__(
        self, log_dir: str | os.PathLike[str], update_freq: str | int = "epoch", **kwargs: Any
    ) -> None:
        if not isinstance(log_dir, str | os.PathLike) or not os.fspath(log_dir):
            raise ArgumentError(f"Expected log_dir to be a non-empty path. Received: {log_dir!r}.")
        if importlib.util.find_spec("tensorboard") is None:
            raise ImportError(
                "PruningSummaries writes files for TensorBoard, which is not installed. "
                "Install it with: pip install tensorboard",
                name="tensorboard",
            )
        self._options = {"log_dir": os.fspath(log_dir), "update_freq": update_freq, **kwargs}
        self._metrics_writer: Any = None
        super().__init__(**self._options)

    def set_model(self, model: Any) -> None:
        """Takes the model that is to be trained."""
        if framework_of(model) == "tf_keras":
            become(self, load().sparsity.keras.PruningSummaries(**self._options), model)
        else:
            super().set_model(model)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Writes the sparsity and threshold of every mask."""
        import tensorflow as tf

        super().on_epoch_begin(epoch, logs)
        if self._metrics_writer is None:
            directory = os.path.join(self._options["log_dir"], "metrics")
            self._metrics_writer = tf.summary.create_file_writer(directory)
        step = int(np.asarray(self.model.optimizer.iterations))
        with self._metrics_writer.as_default():
            for path, layer in walk(self.model):
                if not is_wrapper(layer):
                    continue
                for number, (_, mask, threshold) in enumerate(layer.pruning_vars):
                    name = f"{path}/{number}" if number else path
                    zeros = 1.0 - float(np.mean(np.asarray(mask)))
                    tf.summary.scalar(f"{name}/mask/sparsity", zeros, step=step)
                    tf.summary.scalar(
                        f"{name}/threshold/threshold", float(np.asarray(threshold)), step=step
                    )
        self._metrics_writer.flush()

    def on_train_end(self, logs: Any = None) -> None:
        """Closes the files."""
        super().on_train_end(logs)
        if self._metrics_writer is not None:
            self._metrics_writer.close()
            self._metrics_writer = None


def become(callback: Any, twin: Any, model: Any) -> None:
    """Lets a Keras 3 callback stand in for its twin of Keras 2, whose hooks do the work.

    tf_keras takes any object with a callback's methods. It asks them which batches they want to
    see, which those of Keras 3 do not know.
    """
    twin.set_params(getattr(callback, "params", None))
    twin.set_model(model)
    questions = (
        "_implements_train_batch_hooks",
        "_implements_test_batch_hooks",
        "_implements_predict_batch_hooks",
    )
    for name in (*_HOOKS, *questions, "set_params"):
        setattr(callback, name, getattr(twin, name))
    callback._supports_tf_logs = getattr(twin, "_supports_tf_logs", False)
