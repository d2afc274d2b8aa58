"""Which rule an operation gets, and what happens without one."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

import keras
import numpy as np
import pytest
import tf_keras

from tfprune.errors import ArgumentError, ModelError, PlanError
from tfprune.graph import analyse
from tfprune.graph.plan import PruningPlan
from tfprune.graph.rules import elementwise, registry, rule
from tfprune.surgery import apply

from .oracle import assert_masked_equals_pruned, chain, random_plan, randomise

# Layers that no inference graph contains, or that wrap code of another framework.
_NO_LAYER_RULE = {
    "Layer": "the base class: it has no call",
    "Wrapper": "the base class of wrappers: it has no call",
    "InputLayer": "an input makes no call; the walk starts behind it",
    "FlaxLayer": "code of another framework: nothing is known of its channels",
    "JaxLayer": "code of another framework: nothing is known of its channels",
    "TorchModuleWrapper": "code of another framework: nothing is known of its channels",
    "TFSMLayer": "a saved graph that cannot be rebuilt",
}

# Operations without a rule: they freeze what they are given, with their name as the reason.
_NO_OP_RULE = {
    "a base class": "Operation",
    "runs functions of the user": "Map Scan AssociativeScan Switch WhileLoop ForiLoop Cond "
    "VectorizedMap Function JVP",
    "positions or sizes are computed": "Scatter ScatterUpdate Slice SliceUpdate Nonzero Unique "
    "ScaleAndTranslate Select",
    "decomposes or solves matrices: every value depends on all": "Cholesky CholeskyInverse Det Eig "
    "Eigh Inv LuFactor Qr Solve SolveTriangular SVD Lstsq MatrixRank Pinv Logdet Slogdet Corrcoef",
    "picks out a diagonal or a triangle": "Diag Diagflat Diagonal Trace Tril Triu",
    "sums over groups or counts": "SegmentReduction SegmentSum SegmentMax SegmentMin SegmentProd "
    "InTopK IsIn Bincount Histogram SearchSorted",
    "transforms whole signals": "ExtractSequences FFT FFT2 IFFT2 RFFT IRFFT STFT ISTFT",
    "reads memory in another type": "ViewAsComplex ViewAsReal View",
    "a loss or a metric": "BinaryCrossentropy CategoricalCrossentropy "
    "SparseCategoricalCrossentropy CTCLoss CTCDecode AllClose",
    "its parameters belong to no layer": "BatchNorm RMSNorm LayerNorm",
    "makes new values, or joins or turns along the batch": "Arange Array Full Geomspace Linspace "
    "Logspace Meshgrid Vander UnravelIndex Ndim Size Rot90 Vstack Dstack Vsplit",
}


def _operations() -> set[str]:
    found = set()
    operation = keras.Operation
    import keras.src.ops as package

    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name.endswith("_test"):
            continue
        for name, value in vars(importlib.import_module(module.name)).items():
            if inspect.isclass(value) and issubclass(value, operation):
                found.add(name)
    return {name for name in found if name not in ("KerasTensor", "Layer")}


def test_every_layer_of_keras_has_a_rule_or_a_reason() -> None:
    layers = {
        value.__name__
        for value in vars(keras.layers).values()
        if inspect.isclass(value) and issubclass(value, keras.layers.Layer)
    }
    assert layers - set(registry._LAYER_RULES) == set(_NO_LAYER_RULE)


def test_every_operation_of_keras_has_a_rule_or_a_reason() -> None:
    excused = {name for names in _NO_OP_RULE.values() for name in names.split()}
    operations = _operations()
    assert operations - set(registry._OP_RULES) == excused
    assert set(registry._OP_RULES) <= operations


@pytest.fixture
def _no_custom_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CUSTOM_RULES", {})


@keras.saving.register_keras_serializable("tests")
class Doubling(keras.layers.Layer):
    """Elementwise, but nobody knows."""

    def call(self, inputs: Any) -> Any:
        return inputs * 2


@keras.saving.register_keras_serializable("tests")
class Scaling(keras.layers.Layer):
    """One factor per channel."""

    def build(self, input_shape: Any) -> None:
        self.gamma = self.add_weight(shape=(input_shape[-1],), name="gamma")

    def call(self, inputs: Any) -> Any:
        return inputs * self.gamma


@keras.saving.register_keras_serializable("tests")
class NoisyDense(keras.layers.Dense):
    """Changes what its parent computes."""

    def call(self, inputs: Any) -> Any:
        return super().call(inputs) + 1.0


@keras.saving.register_keras_serializable("tests")
class NamedDense(keras.layers.Dense):
    """Changes nothing of what its parent computes."""

    def __init__(self, units: int, **options: Any) -> None:
        super().__init__(units, **options)

    def get_config(self) -> dict[str, Any]:
        return super().get_config()


def _with(layer: Any) -> Any:
    layers = keras.layers
    return chain(keras, (6,), layers.Dense(8, name="a"), layer, layers.Dense(3, name="last"))


@pytest.mark.usefixtures("_no_custom_rules")
def test_an_unknown_layer_freezes_and_says_what_to_do() -> None:
    model = _with(Doubling(name="twice"))
    assert_masked_equals_pruned(model, set())
    graph = analyse(model)
    assert "no rule for Doubling; register one with tfprune.rule(Doubling)" in graph["a"].reason
    assert [note.path for note in graph.notes] == ["twice"]


@pytest.mark.usefixtures("_no_custom_rules")
def test_rules_of_the_user() -> None:
    rule(Doubling, elementwise)

    @rule(Scaling)
    def scaling(call: Any) -> Any:
        labels = call.inputs[0]
        call.weight(call.op.gamma, "gamma", follows={-1: labels[-1]})
        return labels

    small = assert_masked_equals_pruned(_with(Doubling()), {"a"})
    assert small.get_layer("a").units == 4
    assert_masked_equals_pruned(_with(Scaling()), {"a"})


@pytest.mark.usefixtures("_no_custom_rules")
def test_a_rule_for_an_instance_is_refused() -> None:
    with pytest.raises(ArgumentError, match="Expected a layer class"):
        rule(Doubling())  # type: ignore[arg-type]


@pytest.mark.usefixtures("_no_custom_rules")
def test_a_subclass_that_changes_the_call_is_not_trusted() -> None:
    model = _with(NoisyDense(8, name="noisy"))
    assert_masked_equals_pruned(model, set())
    assert "NoisyDense changes call of Dense" in analyse(model)["a"].reason
    rule(NoisyDense, registry._LAYER_RULES["Dense"])
    assert_masked_equals_pruned(_with(NoisyDense(8, name="noisy")), {"a", "noisy"})


def test_a_subclass_that_changes_only_its_configuration_is_trusted() -> None:
    assert_masked_equals_pruned(_with(NamedDense(8, name="named")), {"a", "named"})


@pytest.mark.usefixtures("_no_custom_rules")
def test_a_rule_that_returns_nonsense_is_told_so() -> None:
    rule(Doubling, lambda call: (None, None, None))
    with pytest.raises(ValueError, match="one tuple per output, with one entry per axis"):
        analyse(_with(Doubling()))


@pytest.mark.usefixtures("_no_custom_rules")
def test_a_rule_that_forgets_a_weight_is_told_so() -> None:
    rule(Scaling, elementwise)
    model = _with(Scaling())
    with pytest.raises(ModelError, match="does not describe all of its weights"):
        apply(model, random_plan(model))


def test_labels_of_the_wrong_size_are_refused() -> None:
    def wrong(call: Any) -> Any:
        call.weight(call.op.gamma, "gamma", follows={0: np.arange(1, 4)})
        return call.inputs[0]

    registry._CUSTOM_RULES[Scaling] = wrong
    try:
        with pytest.raises(ValueError, match=r"Expected 8 labels for axis 0 of 'gamma'"):
            analyse(_with(Scaling()))
    finally:
        del registry._CUSTOM_RULES[Scaling]


@pytest.mark.parametrize("framework", [keras, tf_keras])
def test_outputs_stay_and_a_lone_channel_stays(framework: Any) -> None:
    layers = framework.layers
    inputs = framework.Input((6,))
    x = layers.Dense(8, name="a")(inputs)
    y = layers.Dense(1, name="one")(x)
    model = framework.Model(inputs, [x, layers.Dense(3, name="last")(y)])
    graph = analyse(model)
    assert graph.prunable == ()
    assert graph["a"].reason == "model output"
    assert graph["one"].reason == "it has only one channel"
    with pytest.raises(PlanError, match="cannot: model output"):
        PruningPlan.of(graph, {"a": [0]})


@pytest.mark.parametrize("framework", [keras, tf_keras])
def test_the_source_stays_as_it_is(framework: Any) -> None:
    layers = framework.layers
    model = chain(
        framework, (5, 6), layers.Dense(8, name="a"), layers.LSTM(4, name="lstm"),
        layers.Lambda(lambda x: x * 2), layers.Dense(3),
    )  # fmt: skip
    randomise(model)
    weights = [np.array(weight) for weight in model.get_weights()]
    nodes = {layer.name: len(layer._inbound_nodes) for layer in model.layers}
    assert_masked_equals_pruned(model, {"a"}, random_weights=False)
    assert {layer.name: len(layer._inbound_nodes) for layer in model.layers} == nodes
    for before, after in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("framework", [keras, tf_keras])
def test_keeping_everything_changes_nothing(framework: Any) -> None:
    layers = framework.layers
    model = chain(framework, (6,), layers.Dense(8, activation="relu", name="a"), layers.Dense(3))
    randomise(model)
    same = apply(model, PruningPlan.of(analyse(model), {"a": range(8)}))
    batch = np.random.default_rng(0).normal(size=(4, 6)).astype("float32")
    # The same operations on the same numbers: equal to the last bit.
    np.testing.assert_array_equal(model.predict(batch, verbose=0), same.predict(batch, verbose=0))
    assert same.get_config() == model.get_config()
