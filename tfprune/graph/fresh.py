"""Draws all weights of a model anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tfprune.errors import ArgumentError
from tfprune.graph.copying import made_again
from tfprune.graph.remake import remake
from tfprune.graph.trace import seed_source, trace


def reinitialise(model: Any, *, seed: int = 0) -> Any:
    """A copy of a model in which all weights are new: drawn by the layers' own initialisers.

    Seeds that are written in the layers' initialisers are not used, so that every ``seed`` gives
    other weights, also where the model itself was built reproducibly. An initialiser sees the
    shapes that are there: in a pruned model, those of fewer channels. The statistics of batch
    normalisation are at their start again. Weights that do not train (``trainable=False``) are
    drawn anew too, and do not train in the copy either. What a preprocessing layer has learnt by
    ``adapt`` stays, for it describes the data.

    Args:
        model: a functional, sequential or nested model of Keras 3 or tf_keras. It stays as it is,
            as do the global random states.
        seed: from 0. The same one gives the same weights, if every initialiser is one of Keras,
            or has a ``seed`` in its configuration.

    Returns:
        A new, uncompiled model of the same framework, with the same names.

    Raises:
        ArgumentError: a negative seed.
        ModelError: a subclassed or unbuilt model, one with pruning wrappers, or a layer that cannot
            be made from its configuration.
    """
    if seed < 0:
        raise ArgumentError(f"Expected a seed from 0; received {seed}.")
    framework = trace(model).framework
    generator = np.random.default_rng(seed)
    with _seeded(framework, seed):
        result, made = made_again(model, lambda op: _anew(op, generator))
    for source, copy in made:
        if hasattr(source, "adapt"):
            state: dict[str, Any] = {}
            source.save_own_variables(state)
            copy.load_own_variables(state)
    return result


@contextlib.contextmanager
def _seeded(framework: str, seed: int) -> Iterator[None]:
    """Lets unseeded initialisers draw reproducibly; the generator's state is put back."""
    source = seed_source(framework)
    before = source.getstate()
    try:
        source.seed(seed)
        yield
    finally:
        source.setstate(before)


def _anew(op: Any, generator: np.random.Generator) -> Any:
    """The same layer or operation from its configuration, with no memory of its seeds."""
    return remake(op, lambda config: _unseeded(config, generator))


def _unseeded(config: Any, generator: np.random.Generator, inside: bool = False) -> Any:
    """A configuration, those inside it included, with other seeds in its initialisers.

    Keras's own initialisers get none and so draw one for every variable: a seed would give equal
    weights to variables that share an initialiser, as the projections of attention do. An
    initialiser of somebody else gets a number.
    """
    if isinstance(config, list | tuple):
        items = [_unseeded(item, generator, inside) for item in config]
        return tuple(items) if isinstance(config, tuple) else items
    if not isinstance(config, Mapping):
        return config
    result = {
        key: _unseeded(value, generator, inside or str(key).endswith("initializer"))
        for key, value in config.items()
        # The shapes that contained layers were built for: they would be built twice.
        if key != "build_config"
    }
    described = result.get("config")
    if inside and isinstance(described, dict) and "seed" in described:
        own = str(result.get("module") or "").partition(".")[0] in ("keras", "tf_keras")
        described["seed"] = None if own else int(generator.integers(2**31))
    return result
