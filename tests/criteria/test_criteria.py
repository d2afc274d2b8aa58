"""What a channel is worth: each criterion against numbers computed by hand, and the contract."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfprune
from tests import toys
from tfprune.criteria import (
    FPGM,
    L1,
    L2,
    ActivationMean,
    APoZ,
    BatchNormScale,
    Random,
    Taylor,
)
from tfprune.testing import check_criterion

DATA = (toys.images(), toys.labels())
ALL = [
    L1(), L2(), BatchNormScale(), FPGM(), Random(3), Taylor(DATA), ActivationMean(DATA[0]),
    APoZ(DATA[0]), L1(reduce="sum", normalize="max", consumers=True), L2(reduce="first"),
]  # fmt: skip


@pytest.mark.parametrize("criterion", ALL, ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("build", [toys.chain, toys.residual])
def test_contract(criterion, build):
    check_criterion(criterion, build())


def kernel(model, name):
    return np.asarray(model.get_layer(name).kernel, np.float64)


def test_norms_by_hand():
    model = toys.chain()
    graph = tfprune.analyse(model)
    weights = kernel(model, "conv1")
    raw = {"normalize": "none"}
    # The library's own sums run in float64 as well; only their order may differ.
    np.testing.assert_allclose(L1(**raw)(graph)["conv1"], np.abs(weights).sum((0, 1, 2)), 1e-12)
    np.testing.assert_allclose(
        L2(**raw)(graph)["conv1"], np.sqrt((weights**2).sum((0, 1, 2))), 1e-12
    )
    mean = np.abs(weights).sum((0, 1, 2)).mean()
    np.testing.assert_allclose(L1()(graph)["conv1"] * mean, L1(**raw)(graph)["conv1"], 1e-12)


def test_all_producers_of_a_group_count():
    model = toys.residual()
    graph = tfprune.analyse(model)
    stem, project = (np.abs(kernel(model, n)).sum((0, 1, 2)) for n in ("stem", "project"))
    assert graph["stem"].width == 16
    raw = {"normalize": "none"}
    np.testing.assert_allclose(L1(reduce="sum", **raw)(graph)["stem"], stem + project, 1e-12)
    np.testing.assert_allclose(L1(reduce="first", **raw)(graph)["stem"], stem, 1e-12)
    np.testing.assert_allclose(
        L1(reduce="max", **raw)(graph)["stem"], np.maximum(stem, project), 1e-12
    )
    head = np.abs(kernel(model, "head")).reshape(64, 16, 5).sum((0, 2))
    expand = np.abs(kernel(model, "expand")).sum((0, 1, 3))
    np.testing.assert_allclose(
        L1(reduce="sum", consumers=True, **raw)(graph)["stem"],
        stem + project + expand + head,
        1e-12,
    )


def test_batch_norm_scale_by_hand():
    model = toys.chain()
    scores = BatchNormScale(normalize="none")(tfprune.analyse(model))
    gamma = np.abs(np.asarray(model.get_layer("norm1").gamma, np.float64))
    np.testing.assert_allclose(scores["conv1"], gamma, 1e-12)


def test_fpgm_by_hand():
    model = toys.chain()
    scores = FPGM(normalize="none")(tfprune.analyse(model))["conv1"]
    filters = kernel(model, "conv1").reshape(-1, 12).T
    distances = np.linalg.norm(filters[:, None] - filters[None], axis=-1).sum(1)
    # d^2 from a Gram matrix cancels: relative rounding of the squares, not of the distances.
    np.testing.assert_allclose(scores, distances, 1e-6)


def test_fpgm_oracles():
    model = toys.chain()
    conv = model.get_layer("conv1")
    weights = np.asarray(conv.kernel).copy()
    graph = tfprune.analyse(model)
    before = FPGM(normalize="none")(graph)["conv1"]
    # Adding the same filter to all of them moves no distance.
    conv.kernel.assign(weights + np.linspace(-1, 1, weights[..., 0].size).reshape(3, 3, 8, 1))
    np.testing.assert_allclose(
        FPGM(normalize="none")(graph)["conv1"], before, 1e-4
    )  # float32 kernel
    # A duplicated pair amid filters that are far from each other is the most replaceable.
    spread = np.zeros_like(weights)
    for j in range(12):
        spread.reshape(-1, 12)[j, j] = 10.0
    spread[..., 5] = spread[..., 2]
    conv.kernel.assign(spread)
    assert set(np.argsort(FPGM()(graph)["conv1"])[:2]) == {2, 5}


def test_taylor_is_the_squared_gradient_of_a_gate():
    """The oracle of sheet 9.3: a gate at the consumer's input has the gradient sum(grad * act)."""
    model = toys.chain()
    x, y = DATA
    score = Taylor(DATA, batch_size=len(x))(tfprune.analyse(model))["conv1"]
    gates = tf.Variable(np.ones(12, "float32"))
    with tf.GradientTape() as tape:
        z = tf.constant(x)
        for layer in model.layers[1:]:
            z = layer(z, training=False) if layer.name.startswith("norm") else layer(z)
            if layer.name == "relu1":
                z = z * gates
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(tf.constant(y), z))
    expected = tape.gradient(loss, gates).numpy().astype(np.float64) ** 2
    # Two float32 graphs of the same derivative, squared.
    np.testing.assert_allclose(score, expected, rtol=1e-3, atol=1e-9)


def test_taylor_averages_over_batches():
    model = toys.chain()
    graph = tfprune.analyse(model)
    x, y = DATA
    halves = [Taylor((x[s], y[s]), batch_size=6)(graph)["conv1"]
              for s in (slice(0, 6), slice(6, 12))]  # fmt: skip
    both = Taylor(DATA, batch_size=6)(graph)["conv1"]
    np.testing.assert_allclose(both, (halves[0] + halves[1]) / 2, rtol=1e-6)


def test_activations_by_hand():
    model = toys.chain()
    graph = tfprune.analyse(model)
    x = DATA[0]
    relu = keras.Model(model.inputs[0], model.get_layer("relu1").output)
    activation = np.asarray(relu(x), np.float64)
    np.testing.assert_allclose(
        ActivationMean(x, normalize="none")(graph)["conv1"], activation.mean((0, 1, 2)), 1e-5
    )  # float32 activations
    np.testing.assert_allclose(APoZ(x)(graph)["conv1"], (activation != 0).mean((0, 1, 2)), 1e-12)


def test_random_is_fixed_by_seed_and_position():
    graph = tfprune.analyse(toys.chain())
    same = Random(1)(graph)["conv1"]
    np.testing.assert_array_equal(same, Random(1)(graph)["conv1"])
    assert not np.array_equal(same, Random(2)(graph)["conv1"])
    assert not np.array_equal(same[:8], Random(1)(graph)["conv0"])
    renamed = keras.models.clone_model(
        graph.model,
        clone_function=lambda layer: type(layer).from_config(
            {**layer.get_config(), "name": f"{layer.name}_9"}
        ),
    )
    np.testing.assert_array_equal(same, Random(1)(tfprune.analyse(renamed))["conv1_9"])


def test_scores_do_not_depend_on_the_order_of_channels():
    model = toys.chain()
    graph = tfprune.analyse(model)
    order = np.random.default_rng(0).permutation(12)
    before = {type(c).__name__: c(graph)["conv1"] for c in (L1(), L2(), FPGM(), BatchNormScale())}
    conv, norm, after = (model.get_layer(n) for n in ("conv1", "norm1", "conv2"))
    conv.set_weights([conv.get_weights()[0][..., order], conv.get_weights()[1][order]])
    norm.set_weights([w[order] for w in norm.get_weights()])
    after.set_weights([after.get_weights()[0][:, :, order], after.get_weights()[1]])
    for criterion in (L1(), L2(), FPGM(), BatchNormScale()):
        np.testing.assert_allclose(
            criterion(graph)["conv1"], before[type(criterion).__name__][order], rtol=1e-9
        )


@pytest.mark.parametrize("name", tfprune.criteria.names())
def test_every_name_works(name):
    model = toys.chain()
    plan = tfprune.plan(model, 0.5, criterion=name, data=DATA, round_to=1)
    assert tfprune.verify(model, plan)


@pytest.mark.parametrize("criterion", [L1(reduce="median"), FPGM(normalize="z")])
def test_unknown_choices(criterion):
    with pytest.raises(tfprune.TfpruneError, match="Expected"):
        criterion(tfprune.analyse(toys.chain()))


def test_data_that_cannot_be_used():
    model = toys.chain()
    with pytest.raises(tfprune.TfpruneError, match="Labels"):
        tfprune.plan(model, 0.5, criterion="taylor", data=DATA[0])
    with pytest.raises(tfprune.TfpruneError, match="empty"):
        tfprune.plan(model, 0.5, criterion="apoz", data=DATA[0][:0])
