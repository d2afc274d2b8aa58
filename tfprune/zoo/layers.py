"""The layers that the networks share: initial values, padding and names in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfprune.errors import ArgumentError


class Layers:
    """Applies layers to symbolic tensors, with seeded initial values.

    Convolutions start from N(0, sqrt(2 / (k * k * filters))) (He, fan out), batch normalisation
    has PyTorch's constants (epsilon 1e-5, momentum 0.9), as in the reference codes. A 3x3
    convolution with stride 2 pads one pixel on every side, as theirs do: Keras's "same" pads only
    at the end, which is another function with the same counts, and one that LiteRT's sparse
    kernels do not take.

    Args:
        seed: makes the initial values reproducible; ``None`` draws fresh ones.
        gamma: initial scale of batch normalisation (0.5 in Network Slimming's networks).
        dense_stddev: standard deviation of the dense kernels; ``None`` is Keras's own
            initial value (Glorot uniform).
    """

    def __init__(
        self, seed: int | None, *, gamma: float = 1.0, dense_stddev: float | None = None
    ) -> None:
        self._seed = seed
        self._drawn = 0
        self._gamma = gamma
        self._dense_stddev = dense_stddev

    def _next_seed(self) -> int | None:
        if self._seed is None:
            return None
        self._drawn += 1
        return int(np.random.SeedSequence([self._seed, self._drawn]).generate_state(1)[0] >> 1)

    def conv(
        self, x: Any, filters: int, kernel: int, name: str, *, strides: int = 1, bias: bool = False
    ) -> Any:
        """A square convolution that keeps the size (stride 1) or halves it (stride 2)."""
        import keras

        padding = "same"
        if strides > 1 and kernel > 1:
            x = keras.layers.ZeroPadding2D(kernel // 2, name=f"{name}_pad")(x)
            padding = "valid"
        initial = keras.initializers.VarianceScaling(
            2.0, mode="fan_out", distribution="untruncated_normal", seed=self._next_seed()
        )
        return keras.layers.Conv2D(
            filters,
            kernel,
            strides=strides,
            padding=padding,
            use_bias=bias,
            kernel_initializer=initial,
            name=name,
        )(x)

    def norm(self, x: Any, name: str) -> Any:
        """Batch normalisation."""
        import keras

        return keras.layers.BatchNormalization(
            momentum=0.9,
            epsilon=1e-5,
            gamma_initializer=keras.initializers.Constant(self._gamma),
            name=name,
        )(x)

    def relu(self, x: Any, name: str) -> Any:
        import keras

        return keras.layers.ReLU(name=name)(x)

    def norm_relu(self, x: Any, name: str) -> Any:
        """Batch normalisation and ReLU: the start of a pre-activation branch."""
        return self.relu(self.norm(x, f"{name}_bn"), f"{name}_relu")

    def conv_norm(self, x: Any, filters: int, kernel: int, name: str, **options: Any) -> Any:
        return self.norm(self.conv(x, filters, kernel, f"{name}_conv", **options), f"{name}_bn")

    def conv_norm_relu(self, x: Any, filters: int, kernel: int, name: str, **options: Any) -> Any:
        return self.relu(self.conv_norm(x, filters, kernel, name, **options), f"{name}_relu")

    def dense(
        self, x: Any, units: int, name: str, *, bias: bool = True, activation: str | None = None
    ) -> Any:
        import keras

        seed = self._next_seed()
        initial = (
            keras.initializers.GlorotUniform(seed=seed)
            if self._dense_stddev is None
            else keras.initializers.RandomNormal(stddev=self._dense_stddev, seed=seed)
        )
        return keras.layers.Dense(
            units, use_bias=bias, activation=activation, kernel_initializer=initial, name=name
        )(x)

    def imagenet_stem(self, x: Any, width: int) -> Any:
        """7x7 convolution with stride 2 and 3x3 maximum pooling with stride 2: size / 4."""
        import keras

        x = self.conv_norm_relu(x, width, 7, "stem", strides=2)
        # After a ReLU a border of zeros never wins against the maximum.
        x = keras.layers.ZeroPadding2D(1, name="stem_pool_pad")(x)
        return keras.layers.MaxPooling2D(3, strides=2, name="stem_pool")(x)


def image_input(shape: Sequence[int], halvings: int) -> Any:
    """The symbolic input of a network that halves the image ``halvings`` times.

    Raises:
        ArgumentError: the shape is not (height, width, channels), or too small, or Keras is
            configured for channels first.
    """
    import keras

    if keras.config.image_data_format() != "channels_last":
        raise ArgumentError(
            "The zoo builds channels-last networks, and Keras is set to 'channels_first'. "
            "Call keras.config.set_image_data_format('channels_last')."
        )
    smallest = 2**halvings
    if len(shape) != 3 or min(shape) < 1 or min(shape[:2]) < smallest:
        raise ArgumentError(
            f"Expected an input shape (height, width, channels) of at least {smallest} pixels a "
            f"side; received {tuple(shape)}."
        )
    return keras.Input(tuple(shape), name="image")


def check_widths(widths: Sequence[int], count: int, what: str) -> tuple[int, ...]:
    """Returns ``widths`` as a tuple, after checking that there are ``count`` positive integers."""
    if len(widths) != count:
        raise ArgumentError(f"Expected {count} {what}; received {len(widths)}: {tuple(widths)}.")
    for width in widths:
        if isinstance(width, bool) or int(width) != width or width < 1:
            raise ArgumentError(f"Expected positive whole numbers as {what}; received {width!r}.")
    return tuple(int(width) for width in widths)
