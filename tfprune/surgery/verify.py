"""The oracle: a removed channel is one that nobody reads any more.

The masked model is the original with the consumers' slices of the removed channels set to zero. Its
outputs must equal those of the rebuilt model, to float rounding, for any input. Nothing here uses
the surgery: the original's calls are evaluated one by one on other values of its weights.

New values that a plan has for a weight stand at the kept positions of the whole weight, in the
masked model; consumers' slices of the removed channels are zero all the same.

A removed block is computed, but the addition at its end leaves it out.

Normalisations that take statistics across channels (layer and group normalisation) read them too:
there the masked model leaves the removed channels out of the statistics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfprune.errors import ModelError
from tfprune.graph import ChannelGraph, analyse
from tfprune.graph.evaluate import call_model, evaluate, flatten
from tfprune.graph.masking import masked_calls, masked_weights
from tfprune.graph.plan import PruningPlan
from tfprune.graph.trace import framework_module, with_values
from tfprune.surgery.rebuild import apply

Array = NDArray[Any]


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        difference: largest absolute difference between an output of the masked and the pruned
            model.
        magnitude: largest absolute output of the masked model.
        tolerance: the largest relative difference that is accepted.
        inexact: groups for which the masked model leaves channels out of statistics.
    """

    difference: float
    magnitude: float
    tolerance: float
    inexact: tuple[str, ...]

    @property
    def relative(self) -> float:
        """``difference / magnitude`` (``difference`` itself where all outputs are zero)."""
        return self.difference / self.magnitude if self.magnitude else self.difference

    @property
    def passed(self) -> bool:
        """Whether the relative difference is within the tolerance (NaN is not)."""
        return bool(self.relative <= self.tolerance)

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        verdict = "masked equals pruned" if self.passed else "masked and pruned DIFFER"
        text = (
            f"{verdict}: largest difference {self.difference:.3g} at outputs up to "
            f"{self.magnitude:.3g} (relative {self.relative:.2g}, accepted {self.tolerance:.0g})"
        )
        if self.inexact:
            text += (
                f"; statistics were taken without the removed channels in {len(self.inexact)} "
                f"groups, such as {self.inexact[0]}"
            )
        return text


def verify(
    model: Any,
    plan: PruningPlan,
    *,
    pruned: Any = None,
    inputs: Any = None,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Verification:
    """Proves the surgery on this very model: masked ≡ pruned.

    Args:
        model: the model that the plan belongs to, of Keras 3 or tf_keras; left as it is.
        plan: the plan to prove.
        pruned: the pruned model, if it is there already; by default the plan is applied.
        inputs: an array or a list of arrays, one per input, with a batch axis; by default a batch
            of two standard-normal examples (free sizes are 32, integer inputs are zeros and ones).
        tolerance: largest accepted difference, relative to the largest output. Float32 sums in
            another order differ by about 1e-7 per addition; over the depth of the networks of
            ``keras.applications`` that stays below 1e-4.
        seed: of the random inputs.

    Returns:
        The verification; its truth value says whether the models agree.

    Raises:
        PlanError: the plan is for another model.
        ModelError: the model has weights that are not finite.
    """
    graph = analyse(model)
    plan = plan.for_graph(graph)
    check_finite(model)
    small = apply(model, plan) if pruned is None else pruned
    given = None if inputs is None else [np.asarray(value) for value in flatten(inputs)]
    batch = given or random_batch(graph, seed)
    expected = masked_outputs(graph, plan, batch)
    received = [np.asarray(y, np.float64) for y in call_model(small, batch)]
    difference = magnitude = 0.0
    for a, b in zip(expected, received, strict=True):
        magnitude = max(magnitude, float(np.max(np.abs(a), initial=0.0)))
        difference = float(np.maximum(difference, np.max(np.abs(a - b), initial=0.0)))
    inexact = tuple(group.name for group in graph.groups if group.name in plan.kept
                    and not group.exact)  # fmt: skip
    return Verification(difference, magnitude, tolerance, inexact)


def check_finite(model: Any) -> None:
    """Raises :class:`ModelError` if a weight of the model is NaN or infinite."""
    for variable in with_values(model.weights):
        value = np.asarray(variable)
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            name = getattr(variable, "path", variable.name)
            bad = int((~np.isfinite(value)).sum())
            raise ModelError(
                f"Expected finite weights. Received: {bad} of {value.size} values of {name!r} are "
                "NaN or infinite. The model did not train well; load an earlier checkpoint."
            )


def masked_outputs(graph: ChannelGraph, plan: PruningPlan, batch: Sequence[Array]) -> list[Array]:
    """The outputs of the masked model, flattened, as float64 arrays."""
    keep = graph.keep(plan.kept)
    values = [(site.variable, value) for site, value in masked_weights(graph, keep, plan.values)]
    with _weights(graph.framework, values):
        outputs = evaluate(graph, batch, override=masked_calls(graph, keep, plan.blocks))
        return [np.asarray(y, np.float64) for y in outputs]


@contextlib.contextmanager
def _weights(framework: str, values: list[tuple[Any, Array]]) -> Iterator[None]:
    """Other values for some weights, for the time of the context."""
    if framework == "keras":
        keras = framework_module("keras")
        mapping = [
            (variable, keras.ops.convert_to_tensor(value, dtype=variable.dtype))
            for variable, value in values
        ]
        with keras.StatelessScope(state_mapping=mapping):
            yield
        return
    before = [(variable, variable.numpy()) for variable, _ in values]
    try:
        for variable, value in values:
            variable.assign(value)
        yield
    finally:
        for variable, value in before:
            variable.assign(value)


def random_batch(graph: ChannelGraph, seed: int, examples: int = 2) -> list[Array]:
    """Standard-normal inputs for a model (zeros and ones for integers); free sizes are 32."""
    random = np.random.default_rng(seed)
    result: list[Array] = []
    for ref in graph.trace.inputs:
        sizes = (32 if size is None else size for size in ref.shape[1:])
        shape = (ref.shape[0] or examples, *sizes)
        if ref.dtype == "string":
            result.append(random.integers(0, 2, shape).astype(str).astype(object))
        elif ref.dtype.startswith(("int", "uint", "bool")):
            result.append(random.integers(0, 2, shape).astype(ref.dtype))
        else:
            result.append(random.standard_normal(shape).astype(ref.dtype))
    return result
