"""Readers as matrices, their moments, and the problems of groups, against explicit sums."""

import keras
import numpy as np
import pytest
import tf_keras
from hypothesis import given, settings
from hypothesis import strategies as st

import tfprune
from tests import toys
from tfprune.criteria.reconstruction.moments import Moments, Sampling, own_moments
from tfprune.criteria.reconstruction.problem import block_sums, group_problem, problem_of
from tfprune.criteria.reconstruction.readers import (
    all_calls,
    draw,
    inputs_at,
    owners_of,
    readers_in,
    readers_of,
)
from tfprune.criteria.reconstruction.solve import solve
from tfprune.criteria.reconstruction.sums import scale_of, sum_behind
from tfprune.testing import randomize

layers = keras.layers
RANDOM = np.random.default_rng(0)


def explicit(reader, rows, owners, width):
    """Contributions, one by one: shape (channels, rows, filters)."""
    matrix = reader.matrix(reader.kernel)
    owners = np.repeat(owners, reader.taps)
    result = np.zeros((width, rows.shape[1], matrix.shape[2] * len(matrix)))
    for channel in range(width):
        parts = [
            x[:, owners == channel] @ w[owners == channel]
            for x, w in zip(rows, matrix, strict=True)
        ]
        result[channel] = np.concatenate(parts, axis=1)
    return result


def everything(reader, tensor):
    """Rows at every position of every example."""
    places = int(np.prod(reader.output_sizes(tensor)))
    examples, places = np.divmod(np.arange(len(tensor) * places), places)
    return reader.rows(tensor, examples, places), examples, places


@st.composite
def convolutions(draw):
    """A convolution and an input for it."""
    rank = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2]))
    dilation = draw(st.sampled_from([1, 1, 2]))
    padding = draw(st.sampled_from(["valid", "same", *(["causal"] if rank == 1 else [])]))
    options = {
        "filters": 2 * draw(st.integers(1, 3)),
        "kernel_size": draw(st.tuples(*[st.integers(1, 3)] * rank)),
        # Keras refuses strides together with dilation.
        "strides": 1 if dilation > 1 else draw(st.tuples(*[st.integers(1, 3)] * rank)),
        "dilation_rate": dilation,
        "padding": padding,
        "groups": groups,
    }
    sizes = draw(st.tuples(*[st.integers(5, 7)] * rank))
    return rank, options, (*sizes, 2 * groups)


@settings(max_examples=25, deadline=None)
@given(convolutions(), st.booleans())
def test_rows_times_matrix_is_what_the_convolution_computes(case, keras2):
    rank, options, shape = case
    # tf_keras has no grouped convolution with dilation on a CPU.
    framework = tf_keras if keras2 and options["groups"] == 1 else keras
    layer = getattr(framework.layers, f"Conv{rank}D")(**options, use_bias=False)
    inputs = framework.Input(shape)
    model = framework.Model(inputs, framework.layers.Flatten()(layer(inputs)))
    (reader,) = [r for r in readers_of(tfprune.analyse(model)).values() if r.window]
    tensor = np.random.default_rng(0).standard_normal((2, *shape)).astype("float32")
    expected = np.asarray(layer(tensor))
    assert reader.output_sizes(tensor) == expected.shape[1:-1]
    rows, examples, places = everything(reader, tensor)
    received = np.concatenate(list(rows @ reader.matrix(reader.kernel)), axis=1)
    # The layer's own sums are in float32.
    np.testing.assert_allclose(received, reader.outputs_at(expected, examples, places), atol=1e-5)
    np.testing.assert_array_equal(reader.unmatrix(reader.matrix(reader.kernel)), reader.kernel)


@pytest.mark.parametrize("framework", [keras, tf_keras], ids=["keras", "tf_keras"])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_rows_of_dense_layers(framework, shape):
    layer = framework.layers.Dense(5, use_bias=False)
    inputs = framework.Input(shape)
    model = framework.Model(inputs, layer(inputs))
    (reader,) = readers_of(tfprune.analyse(model)).values() or [None]
    tensor = RANDOM.standard_normal((3, *shape)).astype("float32")
    rows, examples, places = everything(reader, tensor)
    received = (rows @ reader.matrix(reader.kernel))[0]
    expected = reader.outputs_at(np.asarray(layer(tensor)), examples, places)
    np.testing.assert_allclose(received, expected, atol=1e-5)  # float32 sums
    assert len(received) == 3 * np.prod(shape[:-1], dtype=int)


def test_channels_first():
    """As Keras stores it; the layer itself need not run on this machine."""
    last = layers.Conv2D(4, 3, strides=2, padding="same", use_bias=False, name="last")
    inputs = keras.Input((3, 7, 6))
    first = layers.Conv2D(
        4, 3, strides=2, padding="same", use_bias=False, data_format="channels_first", name="first"
    )
    reader = readers_of(tfprune.analyse(keras.Model(inputs, layers.Flatten()(first(inputs)))))[
        "first"
    ]
    tensor = RANDOM.standard_normal((2, 3, 7, 6)).astype("float32")
    last.build((None, 7, 6, 3))
    last.kernel.assign(np.asarray(first.kernel))
    expected = np.moveaxis(np.asarray(last(np.moveaxis(tensor, 1, -1))), -1, 1)
    rows, examples, places = everything(reader, tensor)
    received = (rows @ reader.matrix(reader.kernel))[0]
    np.testing.assert_allclose(received, reader.outputs_at(expected, examples, places), atol=1e-5)


def test_which_layers_are_readers():
    model = toys.residual()
    graph = tfprune.analyse(model)
    readers = readers_of(graph)
    assert list(readers) == ["stem", "expand", "squeeze", "excite", "project", "head"]
    assert [r.path for r in readers_in(graph["stem"], readers)] == ["expand", "head"]
    # The depthwise convolution follows; what reads it are the squeeze and the projection.
    assert [r.path for r in readers_in(graph["expand"], readers)] == ["squeeze", "project"]
    owners = owners_of(readers["head"], graph["stem"])
    np.testing.assert_array_equal(owners, np.tile(np.arange(16), 64))  # 8 x 8 rows per channel


def test_inner_layers_and_shared_ones_are_seen_as_often_as_they_run():
    inside = keras.Input((6,))
    block = keras.Model(inside, layers.Dense(6, name="dense")(inside), name="block")
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(2, name="out")(block(layers.ReLU()(block(inputs)))))
    graph = tfprune.analyse(model)
    reader = readers_of(graph)["block/dense"]
    assert len(reader.calls) == 1
    assert sum(id(call) == reader.calls[0] for call in all_calls(graph)) == 2
    data = RANDOM.standard_normal((5, 6)).astype("float32")
    seen = inputs_at(graph, [data], set(reader.calls), {})[reader.calls[0]]
    np.testing.assert_allclose(seen[0][0], data)
    np.testing.assert_allclose(
        seen[1][0], np.maximum(np.asarray(block(data)), 0), rtol=1e-5
    )  # float32
    moments = own_moments(graph, [reader], Sampling(data, None, 1, 0, 2))
    assert moments[reader.path].rows == 10


def test_moments_are_those_of_all_rows_whatever_the_batches():
    model = toys.chain()
    graph = tfprune.analyse(model)
    reader = readers_of(graph)["conv1"]
    data = toys.images(10)
    whole = own_moments(graph, [reader], Sampling(data, None, 64, 0, 64))["conv1"]
    parts = own_moments(graph, [reader], Sampling(data, None, 64, 0, 3))["conv1"]
    relu = keras.Model(model.inputs[0], model.get_layer("relu0").output)(data)
    rows, *_ = everything(reader, np.asarray(relu))
    # Activations in float32, computed for other sizes of a batch.
    np.testing.assert_allclose(whole.gram[0], rows[0].T @ rows[0], rtol=1e-5)
    np.testing.assert_allclose(parts.gram[0], rows[0].T @ rows[0], rtol=1e-5)
    assert whole.rows == parts.rows == 640
    some = own_moments(graph, [reader], Sampling(data, 7, 10, 0, 4))["conv1"]
    assert some.rows == 70


def test_positions_are_drawn_by_the_seed_and_all_taken_where_few():
    reader = readers_of(tfprune.analyse(toys.chain()))["conv1"]
    tensor = np.zeros((3, 8, 8, 8))
    first, again = (draw(reader, tensor, 10, np.random.default_rng(0)) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (first[1] != draw(reader, tensor, 10, np.random.default_rng(1))[1]).any()
    np.testing.assert_array_equal(first[0], np.repeat(np.arange(3), 10))
    examples, places = draw(reader, tensor, 100, np.random.default_rng(0))
    assert len(set(zip(examples.tolist(), places.tolist(), strict=True))) == len(places) == 192


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1),
    st.booleans(),
)  # fmt: skip
def test_block_sums_are_inner_products_of_contributions(taps, filters, width, seed, others):
    """Sheet A2, "Beyond sampling": G from A and B, equal to the explicit contributions."""
    random = np.random.default_rng(seed)
    owners = random.integers(-1 if others else 0, width, 7)
    x = random.standard_normal((20, 7 * taps))
    w = random.standard_normal((7 * taps, filters))
    spread = np.repeat(owners, taps)
    z = [x[:, spread == c] @ w[spread == c] for c in (*range(width), -1)]
    expected = [[np.sum(a * b) for b in z] for a in z]
    received = block_sums(x.T @ x, w, owners, width, taps)
    np.testing.assert_allclose(received, expected, atol=1e-9)  # float64 sums of some 100 terms


def test_block_sums_in_several_blocks(monkeypatch):
    from tfprune.criteria.reconstruction import problem

    a, w = RANDOM.standard_normal((60, 60)), RANDOM.standard_normal((60, 4))
    owners = RANDOM.integers(-1, 6, 20)
    whole = block_sums(a, w, owners, 6, 3)
    monkeypatch.setattr(problem, "_BLOCK", 60 * 3 * 7)
    np.testing.assert_allclose(block_sums(a, w, owners, 6, 3), whole, rtol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
def test_problem_against_explicit_regressors(groups):
    """Sheet A3, "Efficient computation": (G, b) from A and D equal those of the explicit Z."""
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, activation="relu", name="conv")(inputs)
    x = layers.Conv2D(6, 2, groups=groups, name="next")(x)
    model = randomize(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))
    graph = tfprune.analyse(model)
    group, reader = graph["conv"], readers_of(graph)["next"]
    tensor = RANDOM.standard_normal((5, 4, 4, 8))
    rows, *_ = everything(reader, tensor)
    y = RANDOM.standard_normal((groups, rows.shape[1], 6 // groups))
    moments = Moments(
        np.stack([x.T @ x for x in rows]),
        np.stack([x.T @ t for x, t in zip(rows, y, strict=True)]),
        (y**2).sum(1),
        rows.shape[1],
    )
    z = explicit(reader, rows, owners_of(reader, group), group.width)
    target = np.concatenate(list(y), axis=1)
    found = problem_of(reader, group, moments, reader.matrix(reader.kernel))
    # float64 sums of some thousand terms.
    np.testing.assert_allclose(found.gram, np.einsum("crf,drf->cd", z, z), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(found.cross, np.einsum("crf,rf->c", z, target), atol=1e-9)
    beta = RANDOM.standard_normal(group.width)
    rest = target - np.einsum("crf,c->rf", z, beta)
    assert found.loss(beta) == pytest.approx(np.sum(rest**2), rel=1e-9)
    # Only some filters: those that somebody still reads.
    outputs = np.tile(np.arange(6 // groups) > 0, groups)
    part = problem_of(reader, group, moments, reader.matrix(reader.kernel), outputs)
    z, target = z[..., outputs], target[:, outputs]
    np.testing.assert_allclose(part.gram, np.einsum("crf,drf->cd", z, z), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(part.cross, np.einsum("crf,rf->c", z, target), atol=1e-9)
    assert part.energy == pytest.approx(np.sum(target**2))


def test_neighbours_in_a_concatenation_are_taken_off_the_target():
    inputs = keras.Input((6, 6, 3))
    a = layers.Conv2D(4, 1, name="a")(inputs)
    b = layers.Conv2D(5, 1, name="b")(inputs)
    x = layers.Conv2D(6, 3, name="c")(layers.Concatenate(name="both")([a, b]))
    model = randomize(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))
    graph = tfprune.analyse(model)
    reader = readers_of(graph)["c"]
    rows, *_ = everything(reader, RANDOM.standard_normal((4, 6, 6, 9)))
    y = RANDOM.standard_normal((1, rows.shape[1], 6))
    moments = Moments(rows.mT @ rows, rows.mT @ y, (y**2).sum(1), rows.shape[1])
    matrix = reader.matrix(reader.kernel)
    found = problem_of(reader, graph["b"], moments, matrix)
    z = {
        name: explicit(reader, rows, owners_of(reader, graph[name]), graph[name].width)
        for name in "ab"
    }
    target = y[0] - z["a"].sum(0)
    np.testing.assert_allclose(found.gram, np.einsum("crf,drf->cd", z["b"], z["b"]), atol=1e-8)
    np.testing.assert_allclose(found.cross, np.einsum("crf,rf->c", z["b"], target), atol=1e-8)
    assert found.energy == pytest.approx(np.sum(target**2))
    # Without targets the channels explain their own sum.
    own = problem_of(reader, graph["b"], Moments(moments.gram, None, None, 0), matrix)
    assert own.loss(np.ones(5)) == pytest.approx(0, abs=1e-9 * own.energy)
    assert own.energy == pytest.approx(np.sum(z["b"].sum(0) ** 2))


def test_readers_count_by_the_part_of_their_response():
    """The scale of a reader's kernel does not decide."""
    inputs = keras.Input((7,))
    x = layers.Dense(5, activation="relu", name="hidden")(inputs)
    outs = [layers.Dense(3, name=name)(x) for name in ("one", "two")]
    model = randomize(keras.Model(inputs, outs))
    data = RANDOM.standard_normal((30, 7)).astype("float32")

    def problem():
        graph = tfprune.analyse(model)
        readers = readers_in(graph["hidden"], readers_of(graph))
        moments = own_moments(graph, readers, Sampling(data, None, 1, 0, 64))
        matrices = {r.path: r.matrix(r.kernel) for r in readers}
        return group_problem(graph["hidden"], readers, moments, matrices)

    before = problem()
    kernel = model.get_layer("two").kernel
    kernel.assign(100 * np.asarray(kernel))
    after = problem()
    np.testing.assert_allclose(after.gram, before.gram, rtol=1e-5)  # a float32 kernel
    np.testing.assert_allclose(after.norms, before.norms, rtol=1e-5)
    assert after.energy == before.energy == 2
    model.get_layer("one").kernel.assign(np.zeros((5, 3)))
    assert problem().energy == 1  # a reader without a response is left out


def test_sums_and_their_scales():
    inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, padding="same", name="stem")(inputs)
    y = layers.Conv2D(8, 3, padding="same", name="inner")(layers.ReLU()(x))
    y = layers.BatchNormalization(name="norm")(layers.Conv2D(8, 1, name="last")(y))
    x = layers.Add(name="sum")([x, y])
    z = layers.Conv2D(8, 1, name="bent", activation="relu")(x)
    w = layers.Conv2D(8, 1, name="plain")(x)
    x = keras.ops.add(layers.Add(name="three")([x, z, w]), 1.0)
    model = randomize(keras.Model(inputs, layers.GlobalAveragePooling2D()(x)))
    norm = model.get_layer("norm")
    gamma = np.asarray(norm.gamma).copy()
    gamma[2], gamma[3] = 0, 1e-9
    norm.gamma.assign(gamma)
    graph = tfprune.analyse(model)
    readers = readers_of(graph)
    found = {path: sum_behind(graph, reader) for path, reader in readers.items()}
    # The stem is read twice, "inner" goes on to a convolution, "bent" has an activation.
    assert [path for path, behind in found.items() if behind] == ["last", "plain"]
    assert found["last"].others == (0,) and found["plain"].others == (0, 1)
    np.testing.assert_array_equal(found["plain"].factor, np.ones(8))
    factor = found["last"].factor
    assert factor[2] == factor[3] == 0
    rest = np.setdiff1d(np.arange(8), [2, 3])
    data = RANDOM.standard_normal((2, 6, 6, 8)).astype("float32")
    step = np.asarray(norm(data + 1)) - np.asarray(norm(data))
    np.testing.assert_allclose(step[..., rest] * factor[rest], 1, rtol=1e-4)  # float32
    np.testing.assert_allclose(scale_of(norm), step[0, 0, 0], rtol=1e-4, atol=1e-6)


def test_sums_written_with_operators_in_tf_keras():
    inputs = tf_keras.Input((4, 4, 3))
    x = tf_keras.layers.Conv2D(3, 1, name="conv")(inputs)
    model = tf_keras.Model(inputs, tf_keras.layers.Flatten()(inputs + x))
    graph = tfprune.analyse(model)
    assert sum_behind(graph, readers_of(graph)["conv"]).others == (0,)


def test_solve():
    x = RANDOM.standard_normal((40, 6))
    x[:, 2] = 0
    right = RANDOM.standard_normal((6, 3))
    alive = [0, 1, 3, 4, 5]
    found = solve(x.T @ x, right, 0)
    exact = np.linalg.solve((x.T @ x)[np.ix_(alive, alive)], right[alive])
    np.testing.assert_allclose(found[alive], exact, rtol=1e-9)
    np.testing.assert_array_equal(found[2], 0)
    np.testing.assert_array_equal(solve(np.zeros((2, 2)), np.ones(2), 0), 0)
    x[:, 3] = x[:, 4] = 1
    with pytest.raises(tfprune.TfpruneError, match="singular one of 5 unknowns, with ridge=0"):
        solve(np.round(x).T @ np.round(x), right, 0)
    assert np.isfinite(solve(x.T @ x, right, 1e-6)).all()
