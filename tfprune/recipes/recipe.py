"""Recipes: everything that a training needs to be named and repeated, in one TOML file."""

from __future__ import annotations

import dataclasses
import inspect
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tfprune import methods, zoo
from tfprune.data import NAMES, load
from tfprune.errors import ArgumentError
from tfprune.loading import SUFFIXES

METHODS: Mapping[str, Any] = MappingProxyType(
    {
        "autopruner": methods.AutoPruner,
        "cfp": methods.FilterCorrelation,
        "csgd": methods.CentripetalSGD,
        "dcp": methods.DiscriminationAwarePruning,
        "ista": methods.ISTA,
        "slimming": methods.NetworkSlimming,
        "sfp": methods.SoftFilterPruning,
        "gdp": methods.GlobalDynamicPruning,
        "group_norm": methods.GroupNormSparsity,
        "growing": methods.GrowingRegularisation,
        "morphnet": methods.MorphNet,
        "ssr": methods.SSR,
        "sss": methods.SparseStructureSelection,
        "aofp": methods.ApproximatedOracle,
    }
)
"""Training-time methods for channels, by their names in recipes and on the command line."""

NETWORKS: Mapping[str, tuple[Any, int]] = MappingProxyType(
    {
        **{f"vgg{depth}": (zoo.vgg_cifar, depth) for depth in (11, 13, 16, 19)},
        **{f"resnet{depth}": (zoo.resnet_cifar, depth) for depth in (20, 32, 44, 56, 110)},
        **{f"preresnet{depth}": (zoo.preresnet_cifar, depth) for depth in (20, 29, 56, 110, 164)},
        "densenet40": (zoo.densenet_cifar, 40),
        "resnet8_digits": (zoo.digits_resnet, 8),
        "resnet14_digits": (zoo.digits_resnet, 14),
    }
)
"""Networks of the zoo by name, with their depth. A recipe may also name a model file."""

# What plain recipes give to methods that have no defaults for it.
_PLAIN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"autopruner": {"alpha_steps": 2000}, "ssr": {"penalty": 0.01}}
)
_PHASES = ("dense", "train", "fine_tune")
_TRAINING = {
    "epochs": int, "learning_rate": float, "schedule": str, "milestones": list, "factor": float,
    "optimizer": str, "momentum": float, "nesterov": bool, "weight_decay": float, "decay": str,
}  # fmt: skip
_DATA = ("batch_size", "validation", "augment", "subset", "normalization")


@dataclass(frozen=True)
class Recipe:
    """One training: which network on which data, by which method, for how long.

    Attributes:
        method: a name of :data:`METHODS`.
        model: a name of :data:`NETWORKS`, or a ``.keras`` or ``.h5`` file that is trained already.
        dataset: a name that :func:`tfprune.data.load` knows.
        about: what it is, and where its settings are from.
        arguments: of the method.
        network: arguments of the zoo's function, such as ``widths``.
        data: arguments of :func:`tfprune.data.load`.
        dense: of the training before the method's, if there is one: ``epochs``, ``learning_rate``,
            ``schedule``, or ``milestones`` (epochs) with ``factor``; ``optimizer``, with
            ``momentum`` and ``nesterov`` for "sgd"; ``weight_decay`` and ``decay``. See
            :func:`tfprune.fine_tune`.
        train: of the training by the method, likewise.
        fine_tune: of the training of the smaller model, likewise; empty for none.
        seed: of weights, data order and chance.

    Raises:
        ArgumentError: an unknown name or key, or a value of the wrong kind.
    """

    method: str
    model: str
    dataset: str
    about: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    dense: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=lambda: {"epochs": 20})
    fine_tune: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        _known("method", self.method, METHODS)
        _known("dataset", self.dataset, NAMES)
        if Path(self.model).suffix not in SUFFIXES:
            _known("model", self.model, NETWORKS, " A model file is also possible.")
        accepted = [f for f in dataclasses.fields(METHODS[self.method]) if f.name != "data"]
        _keys("arguments", self.arguments, [item.name for item in accepted])
        without = (dataclasses.MISSING, dataclasses.MISSING)
        needed = [f.name for f in accepted if (f.default, f.default_factory) == without]
        missing = [name for name in needed if name not in self.arguments]
        if missing:
            raise ArgumentError(
                f"Expected {', '.join(missing)} in [arguments]: {self.method} has no default for "
                "it. On the command line, --set arguments.NAME=VALUE."
            )
        if self.model in NETWORKS:
            _keys("network", self.network, _parameters(NETWORKS[self.model][0]))
        elif self.network:
            raise ArgumentError(
                f"Expected no [network] for a model file. Received: {dict(self.network)}."
            )
        _keys("data", self.data, _DATA)
        for phase in _PHASES:
            _check_training(phase, getattr(self, phase))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ArgumentError(f"Expected seed as a whole number from 0. Received: {self.seed!r}.")
        if not self.train:
            raise ArgumentError("Expected [train] with epochs. Received: none.")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as they would stand in a file."""
        return {
            item.name: dict(value) if isinstance(value, Mapping) else value
            for item in dataclasses.fields(self)
            for value in [getattr(self, item.name)]
        }

    def changed(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with other values.

        Args:
            changes: from ``"seed"``, or ``"train.epochs"`` for an entry of a table, to the value.

        Raises:
            ArgumentError: as for the class; an unknown key.
        """
        plain = self.as_dict()
        for key, value in changes.items():
            table, dot, entry = key.partition(".")
            _keys("a recipe", {table: value}, list(plain))
            if not dot:
                plain[table] = value
            elif isinstance(plain[table], dict):
                plain[table] = {**plain[table], entry: value}
            else:
                raise ArgumentError(f"Expected the key {table!r} without a dot. Received: {key!r}.")
        return Recipe(**plain)


def names() -> tuple[str, ...]:
    """The recipes that come with tfprune, one per published setting."""
    folder = resources.files("tfprune.recipes")
    return tuple(sorted(p.name[:-5] for p in folder.iterdir() if p.name.endswith(".toml")))


def read(source: str | os.PathLike[str]) -> Recipe:
    """A recipe by its name, or from a TOML file.

    Args:
        source: one of :func:`names`, or the path of a file that ends in ``.toml``.

    Raises:
        ArgumentError: neither, or no such recipe.
    """
    text = os.fspath(source)
    if not text.endswith(".toml"):
        _known("recipe", text, names(), " Or a file that ends in .toml.")
        content = resources.files("tfprune.recipes").joinpath(f"{text}.toml").read_bytes()
    else:
        try:
            content = Path(text).read_bytes()
        except OSError as error:
            raise ArgumentError(
                f"Expected a recipe file. Received: {text!r} ({error.strerror})."
            ) from error
    try:
        values = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArgumentError(f"Expected a TOML file. Received: {text!r}, where {error}.") from error
    _keys(text, values, [item.name for item in dataclasses.fields(Recipe)])
    missing = [key for key in ("method", "model", "dataset") if key not in values]
    if missing:
        raise ArgumentError(f"Expected {', '.join(missing)} in the recipe {text!r}.")
    return Recipe(**values)


def find(method: str, model: str, dataset: str) -> Recipe:
    """The recipe of that method, model and data set if there is one, else a plain one.

    Raises:
        ArgumentError: an unknown name.
    """
    for name in names():
        recipe = read(name)
        if (recipe.method, recipe.model, recipe.dataset) == (method, model, dataset):
            return recipe
    training = {"learning_rate": 0.05, "schedule": "cosine"}
    # These have a weight decay of their own.
    decay = {} if method in ("csgd", "sss") else {"weight_decay": 1e-4}
    return Recipe(
        method,
        model,
        dataset,
        about="no published setting: plain defaults",
        arguments={"macs": 0.5, **_PLAIN.get(method, {})},
        data={"batch_size": 64, "augment": dataset != "digits"},
        train={"epochs": 20, **training, **decay},
        fine_tune={"epochs": 10, **training, "learning_rate": 0.02, "weight_decay": 1e-4},
    )


def _known(what: str, value: Any, known: Any, more: str = "") -> None:
    if value not in known:
        raise ArgumentError(
            f"Expected {what} as one of {', '.join(known)}.{more} Received: {value!r}."
        )


def _keys(what: str, values: Any, known: Any) -> None:
    if not isinstance(values, Mapping):
        raise ArgumentError(f"Expected [{what}] as a table. Received: {values!r}.")
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ArgumentError(
            f"Expected in {what} only {', '.join(known)}. Received: {', '.join(unknown)}."
        )


def _parameters(function: Any) -> list[str]:
    taken = ("depth", "classes", "input_shape", "seed")
    return [name for name in inspect.signature(function).parameters if name not in taken]


def _check_training(phase: str, options: Any) -> None:
    _keys(phase, options, list(_TRAINING))
    for key, value in options.items():
        kind = _TRAINING[key]
        good = isinstance(value, int | float) if kind is float else isinstance(value, kind)
        if not good or (isinstance(value, bool) and kind is not bool):
            raise ArgumentError(f"Expected {phase}.{key} as {kind.__name__}. Received: {value!r}.")
    if options and "epochs" not in options:
        raise ArgumentError(f"Expected epochs in [{phase}]. Received: {', '.join(options)}.")
    if ("milestones" in options) != ("factor" in options):
        raise ArgumentError(f"Expected milestones and factor together in [{phase}].")
    if "milestones" in options and "schedule" in options:
        raise ArgumentError(f"Expected a schedule or milestones in [{phase}]. Received: both.")


def splits_of(recipe: Recipe) -> Any:
    """The recipe's data set, a :class:`tfprune.data.Splits`.

    Raises:
        ArgumentError, DataError: what :func:`tfprune.data.load` raises.
    """
    return load(recipe.dataset, seed=recipe.seed, **recipe.data)
