"""Cost by hand-written arithmetic, and for a plan without rebuilding."""

import keras
import numpy as np
import pytest

import tfprune
from tests import toys
from tfprune.cost import CostModel, measure


def test_by_hand():
    cost = measure(toys.chain())
    conv = [3 * 3 * 3 * 8, 3 * 3 * 8 * 12, 3 * 3 * 12 * 16]
    assert cost.macs == 8 * 8 * sum(conv) + 16 * 5
    biases, norms, head = 8 + 12 + 16, 4 * (8 + 12 + 16), 16 * 5 + 5
    assert cost.parameters == sum(conv) + biases + norms + head
    # Moving means and variances are not trained.
    assert cost.trainable_parameters == cost.parameters - norms // 2
    assert cost.size_bytes == 4 * cost.parameters
    # Input, then three outputs (convolution, normalisation, ReLU) per stage, pooling and head.
    activations = 64 * 3 + 3 * 64 * (8 + 12 + 16) + 16 + 5
    assert cost.activation_bytes == 4 * activations
    by_path = {layer.path: layer for layer in cost.layers}
    assert by_path["conv1"].macs == 64 * conv[1]
    assert by_path["conv1"].parameters == conv[1] + 12
    assert by_path["norm1"].parameters == 4 * 12
    assert "conv1" in str(cost)


@pytest.mark.parametrize("build", [toys.chain, toys.residual])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_plan_costs_what_the_pruned_model_costs(build, ratio):
    model = build()
    plan = tfprune.plan(model, ratio, round_to=1)
    foretold, real = measure(model, plan), measure(plan.apply(model))
    assert foretold == real
    assert foretold.macs < measure(model).macs


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        # Every output position multiplies the whole window.
        (lambda: keras.layers.Conv1D(6, 3), (10, 4), 8 * 3 * 4 * 6),
        (lambda: keras.layers.Conv3D(2, 2), (4, 4, 4, 3), 27 * 8 * 3 * 2),
        (lambda: keras.layers.Conv2D(8, 3, groups=4), (5, 5, 8), 9 * 9 * (8 // 4) * 8),
        (lambda: keras.layers.Conv2D(6, 3, strides=2, padding="same"), (8, 8, 4), 16 * 9 * 4 * 6),
        # A transposed convolution multiplies every input position with the whole window.
        (lambda: keras.layers.Conv2DTranspose(6, 3, strides=2), (4, 4, 5), 16 * 9 * 5 * 6),
        (lambda: keras.layers.DepthwiseConv2D(3, depth_multiplier=2), (6, 6, 5), 16 * 9 * 5 * 2),
        (lambda: keras.layers.SeparableConv2D(7, 3), (6, 6, 5), 16 * (9 * 5 + 5 * 7)),
        (lambda: keras.layers.Dense(7), (3, 5), 3 * 5 * 7),
        (
            lambda: keras.layers.EinsumDense("abc,cd->abd", output_shape=(None, 6)),
            (3, 5),
            3 * 5 * 6,
        ),
        # Input and recurrent kernels, four gates, every time step.
        (lambda: keras.layers.LSTM(6), (7, 5), 7 * 4 * 6 * (5 + 6)),
        (lambda: keras.layers.GRU(6), (7, 5), 7 * 3 * 6 * (5 + 6)),
    ],
)
def test_layers_by_hand(layer, shape, macs):
    inputs = keras.Input(shape)
    assert measure(keras.Model(inputs, layer()(inputs))).macs == macs


def test_attention_by_hand():
    inputs = keras.Input((10, 12))
    attention = keras.layers.MultiHeadAttention(num_heads=3, key_dim=4, value_dim=5)
    model = keras.Model(inputs, attention(inputs, inputs))
    projections = 10 * 12 * 3 * (4 + 4 + 5) + 10 * 3 * 5 * 12
    products = 3 * 10 * 10 * (4 + 5)
    assert measure(model).macs == projections + products


def test_shared_layers_cost_macs_per_call_and_parameters_once():
    layer = keras.layers.Dense(4)
    inputs = keras.Input((4,))
    cost = measure(keras.Model(inputs, layer(layer(inputs))))
    assert cost.macs == 2 * 4 * 4
    assert cost.parameters == 4 * 4 + 4


def test_free_sizes():
    inputs = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(8, 3, padding="same")(inputs)
    outputs = keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x))
    model = keras.Model(inputs, outputs)
    assert measure(model).macs is None
    assert measure(model).parameters == 27 * 8 + 8 + 8 * 2 + 2
    assert measure(model, input_shape=(10, 10, 3)).macs == 100 * 27 * 8 + 8 * 2
    with pytest.raises(tfprune.TfpruneError, match="input_shape"):
        tfprune.plan(model, macs=0.5)
    assert tfprune.plan(model, macs=0.5, input_shape=(10, 10, 3), round_to=1).kept
    with pytest.raises(tfprune.TfpruneError, match="fit inputs of shape"):
        measure(model, input_shape=(10, 3))


def test_shares():
    graph = tfprune.analyse(toys.chain())
    costs = CostModel(graph)
    shares = costs.share_of_macs()
    total = costs.macs(costs.full_mask())
    assert np.isclose(shares["conv0"], 64 * (27 * 8 + 9 * 8 * 12) / total)
    # Only what reads the image and makes the logits touches nothing prunable: nothing here.
    assert costs.frozen_share_of_macs() == 0
