"""What all methods share: prepare, train with callbacks, finish."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import keras
import numpy as np

from tfprune.arguments import check_whole
from tfprune.errors import ArgumentError
from tfprune.layers import UpdatePruningStep, masks_of, set_masks, strip_pruning, with_masks
from tfprune.layers.distribution import strategy_scope
from tfprune.layers.masks import Masks
from tfprune.layers.prunable import prunable_weights
from tfprune.protocols import FineTuneRecord, fine_tune


@dataclass(frozen=True)
class MethodResult:
    """What :meth:`Method.run` returns.

    Attributes:
        model: the finished model, an ordinary uncompiled Keras model.
        record: how the training went.
        sparsity: the fraction of exact zeros among the finished model's prunable weights.
            ``Masks.of_zeros(result.model).sparsities`` has it for each.
    """

    model: Any
    record: FineTuneRecord
    sparsity: float


class Method(ABC):
    """A pruning method that trains: what to do before, during and after.

    A method holds hyper-parameters only. All state is in the model that :meth:`prepare` returns,
    and the callbacks act on epoch numbers, so that a training that is resumed from a checkpoint
    ends as one that was not interrupted.
    """

    changes_masks: ClassVar[bool] = False
    """Whether masks change during training, so that an earlier epoch is another sparsity."""

    @abstractmethod
    def prepare(self, model: Any) -> Any:
        """The model to train, a new one; ``model`` stays as it is.

        Args:
            model: a built functional, sequential or nested Keras 3 model, on TensorFlow.

        Raises:
            ModelError: another kind of model. For tf_keras use tensorflow_model_optimization.
            ArgumentError: the method cannot do with this model what its arguments ask.
        """

    @abstractmethod
    def callbacks(self) -> list[Any]:
        """New Keras callbacks that ``fit`` or ``fine_tune`` must be given."""

    @abstractmethod
    def finish(self, model: Any, data: Any = None, *, structured: bool = False) -> Any:
        """The finished model, a new one without anything of the method in it.

        Args:
            model: from :meth:`prepare`, trained. It stays as it is.
            data: training data, for methods that look at data at the end.
            structured: also remove channels of which nothing is left, and with them make the
                model smaller.
        """

    def run(
        self, model: Any, train: Any, validation: Any = None, *, epochs: int, **options: Any
    ) -> MethodResult:
        """Prepares, trains with :func:`tfprune.fine_tune`, and finishes.

        Args:
            model: as for :meth:`prepare`.
            train, validation, epochs: as for ``fine_tune``. Give no test data.
            **options: of ``fine_tune``: ``learning_rate``, ``checkpoint``, ``callbacks`` and so on.

        Returns:
            Model, record and sparsity. The record comes with the model, not on the method, because
            methods are values: one can be used for several runs.

        Raises:
            ArgumentError: ``epochs`` too few for what the method does, or an option that would
                undo it. Both are found before any training.
            What :meth:`prepare` and ``fine_tune`` raise.
        """
        options = self.fit_options(epochs, dict(options))
        prepared = self.prepare(model)
        callbacks = [*self.callbacks(), *options.pop("callbacks", ())]
        record = fine_tune(
            prepared, train, validation, epochs=epochs, callbacks=callbacks, **options
        )
        finished = self.finish(prepared, train)
        return MethodResult(finished, record, Masks.of_zeros(finished).sparsity)

    @property
    def epochs_needed(self) -> int:
        """The fewest epochs of training in which the method does all that it does."""
        return 1

    def fit_options(self, epochs: int, options: dict[str, Any]) -> dict[str, Any]:
        """The options for ``fine_tune``, checked: call it if you train without :meth:`run`.

        Args:
            epochs: of the training.
            options: what ``fine_tune`` is to be given besides.

        Raises:
            ArgumentError: too few epochs, or an option that would undo what the method does.
        """
        check_whole("epochs", epochs, 1)
        if epochs < self.epochs_needed:
            raise ArgumentError(
                f"Expected at least {self.epochs_needed} epochs, in which {type(self).__name__} "
                f"does all its steps. Received: {epochs}."
            )
        refused = [name for name in ("restore_best", "patience") if options.get(name)]
        if self.changes_masks and refused:
            raise ArgumentError(
                f"Expected a training to its last epoch, because {type(self).__name__} changes "
                f"the masks on the way. Received: {', '.join(refused)}, which may end at an "
                "earlier epoch, and so at another sparsity."
            )
        return options


class MaskMethod(Method):
    """A method whose result is a model with zeros."""

    def callbacks(self) -> list[Any]:
        """New Keras callbacks that ``fit`` or ``fine_tune`` must be given."""
        return [UpdatePruningStep()]

    def finish(self, model: Any, data: Any = None, *, structured: bool = False) -> Any:
        """The plain model, masked weights exactly zero.

        Args:
            model: from :meth:`prepare`, trained. It stays as it is.
            data: not used.
            structured: remove the channels that are zero, which makes the model smaller and
                leaves its outputs as they are.

        Returns:
            A new, uncompiled model without pruning wrappers.
        """
        finished = strip_pruning(model)
        if not structured:
            return finished
        from tfprune.surgery import remove_zero_channels

        return remove_zero_channels(finished)


class OneShotMethod(MaskMethod):
    """A method that chooses once, before training; the masks are then held."""

    @abstractmethod
    def masks(self, model: Any) -> Masks:
        """Which weights stay. ``model`` stays as it is.

        Raises:
            ModelError, ArgumentError: as :meth:`prepare`.
        """

    def prepare(self, model: Any) -> Any:
        """A copy of the model with these masks, which training holds."""
        return with_masks(plain_copy(model), self.masks(model))


class IterativeMethod(MaskMethod):
    """A method that chooses at the start of every round, among what the last round left.

    Attributes:
        rounds: how often.
        epochs_per_round: of training between two choices; what is left of the epochs is the last
            round's.
    """

    rounds: int
    epochs_per_round: int

    @abstractmethod
    def masks(self, model: Any, round_number: int = 0, current: Masks | None = None) -> Masks:
        """Which weights stay in a round, none that are gone. ``model`` stays as it is.

        Args:
            model: plain, or wrapped and with its masks as ``current``.
            round_number: from 0.
            current: the masks of the round before; ``None`` if nothing was pruned yet.

        Raises:
            ModelError, ArgumentError: as :meth:`prepare`.
        """

    @property
    def epochs_needed(self) -> int:
        """Enough for every round to have an epoch of training after its choice."""
        return (self.rounds - 1) * self.epochs_per_round + 1

    def prepare(self, model: Any) -> Any:
        """A copy of the model with the masks of the first round."""
        return with_masks(plain_copy(model), self.masks(model))

    def callbacks(self) -> list[Any]:
        """What updates the masks where a round begins, and what holds them."""
        return [
            AtEpochs(
                {
                    number * self.epochs_per_round: self._begin(number)
                    for number in range(1, self.rounds)
                }
            ),
            *super().callbacks(),
        ]

    def _begin(self, number: int) -> Callable[[Any], None]:
        def begin(model: Any) -> None:
            current = masks_of(model)
            set_masks(model, self.masks(model, number, current))

        return begin

    def fit_options(self, epochs: int, options: dict[str, Any]) -> dict[str, Any]:
        if self.rounds == 1:
            # One round is one choice before training; an earlier epoch has the same masks.
            check_whole("epochs", epochs, 1)
            return options
        return super().fit_options(epochs, options)


class AtEpochs(keras.callbacks.Callback):  # type: ignore[misc]
    """Calls functions of the model where certain epochs begin.

    It depends on nothing but the number of the epoch that Keras passes, so that a resumed training
    meets the same calls. The functions run in the scope of the model's distribution strategy.

    Args:
        actions: number of the epoch, from 0 -> function of the model.
    """

    def __init__(self, actions: Mapping[int, Callable[[Any], None]]) -> None:
        super().__init__()
        self._actions = dict(actions)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Does what is due at this epoch."""
        action = self._actions.get(epoch)
        if action is not None:
            with strategy_scope(self.model):
                action(self.model)


def plain_copy(model: Any) -> Any:
    """A copy of a model, weights included, without pruning wrappers.

    Raises:
        ModelError: no built Keras 3 model, or an unknown layer in it.
    """
    prunable_weights(model)  # refuses tf_keras, unbuilt models and unknown layers
    return strip_pruning(model)


def values(model: Any, masks: Masks | None = None) -> dict[str, Any]:
    """Path -> float64 array of every prunable weight, with zeros where ``masks`` say so."""
    arrays = {
        path: np.asarray(variable).astype(np.float64)
        for path, variable in prunable_weights(model).items()
    }
    if masks is None:
        return arrays
    masks.check(model)
    return {path: np.where(masks[path], array, 0.0) for path, array in arrays.items()}
