"""What can be analysed, and what the error says where something cannot."""

import keras
import numpy as np
import pytest
import tf_keras

import tfprune
from tests import toys


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(x)


class FunctionalByInheritance(keras.Model):
    """Made of symbolic tensors in its constructor: as good as a functional model."""

    def __init__(self):
        inputs = keras.Input((6,))
        hidden = keras.layers.Dense(8, name="hidden")(inputs)
        super().__init__(inputs, keras.layers.Dense(2)(hidden))


def test_a_subclassed_model_is_refused_with_the_remedy():
    model = Subclassed()
    model(np.zeros((1, 4), "float32"))
    for task in (tfprune.analyse, lambda m: tfprune.prune(m, 0.5)):
        with pytest.raises(tfprune.TfpruneError, match=r"'Subclassed'.*keras\.Input"):
            task(model)


def test_a_subclassed_model_of_keras_2_is_refused():
    class Other(tf_keras.Model):
        def call(self, x):
            return x

    with pytest.raises(tfprune.TfpruneError, match="'Other'"):
        tfprune.analyse(Other())


def test_a_nested_subclassed_model_is_refused():
    inputs = keras.Input((4,))
    with pytest.raises(tfprune.TfpruneError, match="'Subclassed'"):
        tfprune.analyse(keras.Model(inputs, Subclassed()(inputs)))


def test_an_unbuilt_model_is_refused():
    model = keras.Sequential([keras.layers.Dense(3)], name="line")
    with pytest.raises(tfprune.TfpruneError, match=r"'line'.*model\.build"):
        tfprune.analyse(model)
    model.build((None, 4))
    assert tfprune.analyse(model).groups


@pytest.mark.parametrize("value", [None, "model.keras", keras.layers.Dense(3), [1, 2]])
def test_other_things_are_refused(value):
    with pytest.raises(tfprune.TfpruneError, match="Expected a Keras model"):
        tfprune.analyse(value)


def test_functional_by_inheritance():
    model = FunctionalByInheritance()
    assert tfprune.prune(model, 0.5, round_to=1).get_layer("hidden").units == 4


def test_analysis_only_reads():
    model = toys.residual()
    nodes = [len(layer._inbound_nodes) for layer in model.layers]
    before = [np.asarray(weight).copy() for weight in model.weights]
    tfprune.analyse(model)
    assert [len(layer._inbound_nodes) for layer in model.layers] == nodes
    for old, weight in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(old, np.asarray(weight))


def test_the_table_names_groups_and_reasons():
    text = str(tfprune.analyse(toys.residual()))
    for word in ("stem", "expand", "squeeze", "head", "model output", "MACs"):
        assert word in text
    with pytest.raises(KeyError, match="stem"):
        tfprune.analyse(toys.residual())["nothing"]
