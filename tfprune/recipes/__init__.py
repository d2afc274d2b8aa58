"""Recipes: published settings of training-time methods, in files that can be run and repeated.

    >>> from tfprune import recipes
    >>> recipe = recipes.read("slimming-vgg19-cifar10")
    >>> recipe.arguments["penalty"], recipe.train["epochs"]
    (0.0001, 160)

``recipes.train(recipe, "folder")`` runs it; so does ``tfprune train --recipe
slimming-vgg19-cifar10``.
"""

from tfprune.recipes.recipe import METHODS, NETWORKS, Recipe, find, names, read
from tfprune.recipes.training import TrainReport, train, widths_of

__all__ = [
    "METHODS",
    "NETWORKS",
    "Recipe",
    "TrainReport",
    "find",
    "names",
    "read",
    "train",
    "widths_of",
]
