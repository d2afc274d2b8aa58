"""The errors that tfprune raises on purpose.

Each message says what was expected, what came, and what to do. All derive from
:class:`TfpruneError`, so that a program (the command line, for one) can tell a request that cannot
be met from a defect. Those about arguments are ``ValueError`` as well, as Python users expect.
"""

from __future__ import annotations


class TfpruneError(Exception):
    """Base of every error that tfprune raises on purpose."""


class ModelError(TfpruneError, ValueError):
    """The model cannot be taken: subclassed, unbuilt, not a Keras model, weights that are NaN."""


class PlanError(TfpruneError, ValueError):
    """The plan is damaged, or belongs to another model."""


class BudgetError(TfpruneError, ValueError):
    """The budget cannot be met; the message names the reachable range."""


class ArgumentError(TfpruneError, ValueError):
    """An argument has a value that is not allowed."""


class DataError(TfpruneError, ValueError):
    """The data are empty, of the wrong shape or without labels."""


class FileError(TfpruneError, OSError):
    """A file cannot be written."""


class ExportError(TfpruneError, RuntimeError):
    """The model could not be converted, or the written model is not equal to the Keras one."""
