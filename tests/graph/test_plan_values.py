"""New values in plans: what fits, what is refused, and the two files on disk."""

import hashlib
import io
import json
import os
import zipfile

import keras
import numpy as np
import pytest
import tf_keras

import tfprune
from tests import toys
from tfprune.graph.plan import PruningPlan

KEPT = {"conv0": [1, 4, 5], "conv1": [0, 11]}
NAMES = ["plan.json", "plan.values.npz"]


def _normal(*shape, dtype="float32"):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


VALUES = {
    "head/bias": _normal(5, dtype="float64"),
    "conv1/kernel": _normal(3, 3, 3, 2),
    "norm1/gamma": _normal(2, dtype="float16"),
}


@pytest.fixture(scope="module")
def model():
    return toys.chain()


@pytest.fixture(scope="module")
def graph(model):
    return tfprune.analyse(model)


@pytest.fixture(scope="module")
def plan(graph):
    return PruningPlan.of(graph, KEPT, {"criterion": "mine"}, values=VALUES)


@pytest.fixture
def path(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def _edit(path, change):
    """Changes the JSON as a person would, or a person who means harm."""
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def _replace_arrays(path, arrays, compression=zipfile.ZIP_STORED):
    """Other contents of the arrays' file, under a checksum that is right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, array in arrays:
            data = io.BytesIO()
            np.lib.format.write_array(data, np.asarray(array), allow_pickle=True)
            archive.writestr(f"{name}.npy", data.getvalue())
    _replace_content(path, buffer.getvalue())


def _replace_content(path, content):
    path.with_name(NAMES[1]).write_bytes(content)
    checksum = hashlib.sha256(content).hexdigest()
    _edit(path, lambda document: document["values"].update(sha256=checksum))


# -- in memory ---------------------------------------------------------------------------------


def test_values_are_copies_that_nobody_writes(graph):
    given = _normal(3, 3, 3, 2)
    plan = PruningPlan.of(graph, KEPT, values={"conv1/kernel": given})
    before = given.copy()
    given += 1
    np.testing.assert_array_equal(plan.values["conv1/kernel"], before)
    with pytest.raises(ValueError, match="read-only"):
        plan.values["conv1/kernel"][:] = 0
    # A view is read-only only as long as its owner is not written to.
    view = given[...]
    view.setflags(write=False)
    plan = PruningPlan.of(graph, KEPT, values={"conv1/kernel": view})
    given += 1
    assert not np.array_equal(plan.values["conv1/kernel"], given)


def test_plans_without_values_have_none(graph):
    plan = PruningPlan.of(graph, KEPT)
    assert plan.values == {}
    assert "new values" not in str(plan)


def test_members_say_the_names(graph):
    names = [member.full_name for member in graph["conv0"].consumers]
    assert names == ["conv1/kernel"]
    assert PruningPlan.of(graph, KEPT, values={names[0]: _normal(3, 3, 3, 2)}).values.keys() == {
        "conv1/kernel"
    }


def test_with_values_adds_and_replaces(graph, plan):
    bias = _normal(2)
    more = plan.with_values(graph, {"conv1/bias": bias, "norm1/gamma": [1.0, 2.0]})
    # in the order of the model, whatever the order they came in
    assert list(more.values) == ["conv1/kernel", "conv1/bias", "norm1/gamma", "head/bias"]
    np.testing.assert_array_equal(more.values["norm1/gamma"], [1.0, 2.0])
    np.testing.assert_array_equal(more.values["conv1/bias"], bias)
    np.testing.assert_array_equal(more.values["conv1/kernel"], VALUES["conv1/kernel"])
    assert more.notes == plan.notes and more.kept == plan.kept
    assert list(plan.values) == ["conv1/kernel", "norm1/gamma", "head/bias"]
    np.testing.assert_array_equal(plan.values["norm1/gamma"], VALUES["norm1/gamma"])


def test_equality_looks_at_values(graph, plan):
    assert plan == PruningPlan.of(graph, KEPT, {"criterion": "mine"}, values=VALUES)
    assert plan != PruningPlan.of(graph, KEPT, {"criterion": "mine"})
    assert plan != plan.with_values(graph, {"norm1/gamma": [1.0, 2.0]})
    assert plan != "plan"


@pytest.mark.parametrize(
    ("names", "words"), [(VALUES, "; 3 weights get new values"), (["head/bias"], "; 1 weight gets")]
)
def test_printing_says_how_many(graph, names, words):
    text = str(PruningPlan.of(graph, KEPT, values={name: VALUES[name] for name in names}))
    assert words in text.splitlines()[0]


def test_bfloat16_becomes_float32(graph):
    value = keras.ops.cast([1.5, -2.0], "bfloat16")
    plan = PruningPlan.of(graph, KEPT, values={"conv1/bias": value})
    assert plan.values["conv1/bias"].dtype == np.float32
    np.testing.assert_array_equal(plan.values["conv1/bias"], [1.5, -2.0])


def test_variables_are_taken(graph, model):
    plan = PruningPlan.of(graph, KEPT, values={"head/bias": model.get_layer("head").bias})
    np.testing.assert_array_equal(
        plan.values["head/bias"], model.get_layer("head").get_weights()[1]
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"conv1": _normal(2)}, r"Received: 'conv1', which the model has not; it has .*'conv1/"),
        ({"conv9/kernel": _normal(2)}, "conv9/kernel"),
        ({"conv1/kernel": _normal(3, 3, 8, 12)}, r"shape \(3, 3, 3, 2\) for 'conv1/kernel'.*"
                                                 r"\(3, 3, 8, 12\)\. Received: shape \(3, 3, 8"),
        ({"conv1/bias": _normal(1)}, r"shape \(2,\) for 'conv1/bias'.*Received: shape \(1,\)"),
        ({"head/bias": 1.0}, r"shape \(5,\) for 'head/bias'.*Received: shape \(\)"),
        ({"conv1/bias": [1.0, np.nan]}, r"finite.*'conv1/bias'\. Received: 1 of 2"),
        ({"conv1/bias": [np.inf, np.nan]}, "Received: 2 of 2"),
        # finite in the plan, not in the model
        ({"conv1/bias": [1e300, 0.0]}, "1 of 2 that are NaN or infinite as float32"),
        ({"conv1/bias": [1, 2]}, "'conv1/bias' of type float16.*Received: int64. Convert"),
        ({"conv1/bias": [True, False]}, "Received: bool"),
        ({"conv1/bias": [1j, 2j]}, "Received: complex128"),
        ({"conv1/bias": ["a", "b"]}, "Received: <U1|Received: str"),
        ({"conv1/bias": [[1.0], [1.0, 2.0]]}, "an array of new values for 'conv1/bias'"),
        ([("conv1/bias", _normal(2))], "as a mapping .*Received: list"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit(graph, values, message):
    with pytest.raises(tfprune.TfpruneError, match=message) as caught:
        PruningPlan.of(graph, KEPT, values=values)
    assert "Expected" in str(caught.value)
    with pytest.raises(tfprune.TfpruneError, match=message):
        PruningPlan.of(graph, KEPT).with_values(graph, values)


def test_weights_that_share_a_name():
    class Twice(keras.layers.Layer):
        def build(self, shape):
            self.one = self.add_weight(shape=(shape[-1],), name="one")
            self.two = self.add_weight(shape=(shape[-1],), name="two")

        def call(self, x):
            return x * self.one + self.two

    def follow(call):
        for weight in (call.op.one, call.op.two):
            call.weight(weight, "same", follows={0: call.inputs[0][-1]})
        return call.inputs[0]

    tfprune.rule(Twice, follow)
    inputs = keras.Input((4,))
    x = Twice(name="twice")(keras.layers.Dense(6, name="wide")(inputs))
    graph = tfprune.analyse(keras.Model(inputs, keras.layers.Dense(2)(x)))
    with pytest.raises(tfprune.TfpruneError, match="'twice/same', which 2 weights share"):
        PruningPlan.of(graph, {"wide": [0, 1]}, values={"twice/same": _normal(2)})


def test_weights_from_which_a_layer_makes_others():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(6, name="wide")(inputs)
    adapted = keras.layers.Normalization(name="adapted")
    adapted.adapt(_normal(20, 6))
    graph = tfprune.analyse(keras.Model(inputs, keras.layers.Dense(2)(adapted(x))))
    with pytest.raises(tfprune.TfpruneError, match="'adapted/adapt_mean', from which"):
        PruningPlan.of(graph, {"wide": [0, 1]}, values={"adapted/adapt_mean": _normal(2)})


@pytest.mark.parametrize("framework", [keras, tf_keras])
def test_names_that_keras_numbered(framework, tmp_path):
    def build():
        layers = framework.layers
        inputs = framework.Input((8, 8, 3))
        x = layers.Conv2D(8, 3)(layers.Conv2D(6, 3)(inputs))
        return framework.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))

    first, second = build(), build()
    graphs = tfprune.analyse(first), tfprune.analyse(second)
    groups = [[group.name for group in graph.prunable] for graph in graphs]
    assert not set(groups[0]) & set(groups[1])
    one, two = groups[0]
    plan = PruningPlan.of(
        graphs[0],
        {one: [2, 3], two: [0, 5, 7]},
        # a weight of the same shape in both layers: neither may take the other's
        values={f"{one}/bias": [1.0, 2.0], f"{two}/kernel": _normal(3, 3, 2, 3)},
    )
    plan.save(tmp_path / "plan.json")
    for known in (plan, PruningPlan.load(tmp_path / "plan.json")):
        renamed = known.for_graph(graphs[1])
        assert list(renamed.values) == [f"{groups[1][0]}/bias", f"{groups[1][1]}/kernel"]
        small = known.apply(second)
        np.testing.assert_array_equal(small.layers[1].get_weights()[1], [1.0, 2.0])
        np.testing.assert_array_equal(
            small.layers[2].get_weights()[0], plan.values[f"{two}/kernel"]
        )
    more = plan.with_values(graphs[1], {f"{groups[1][1]}/bias": _normal(3)})
    assert list(more.values) == [f"{groups[1][0]}/bias", f"{groups[1][1]}/kernel",
                                 f"{groups[1][1]}/bias"]  # fmt: skip


# -- on disk -----------------------------------------------------------------------------------


def test_round_trip(plan, path):
    assert sorted(p.name for p in path.parent.iterdir()) == NAMES
    loaded = PruningPlan.load(path)
    assert loaded == plan
    for name, value in plan.values.items():
        assert loaded.values[name].dtype == value.dtype
        assert not loaded.values[name].flags.writeable


def test_the_arrays_are_an_ordinary_npz_file(plan, path):
    with np.load(path.with_name(NAMES[1]), allow_pickle=False) as archive:
        assert sorted(archive.files) == sorted(VALUES)
        np.testing.assert_array_equal(archive["conv1/kernel"], VALUES["conv1/kernel"])


def test_the_json_can_be_read_and_diffed(plan, path):
    text = path.read_text()
    lines = text.splitlines()
    assert sum('"shape"' in line for line in lines) == len(VALUES)
    assert '      "conv1/kernel": {"shape": [3, 3, 3, 2], "dtype": "float32"},' in lines
    assert hashlib.sha256(path.with_name(NAMES[1]).read_bytes()).hexdigest() in text
    # the same plan makes the same files
    before = [path.with_name(name).read_bytes() for name in NAMES]
    PruningPlan.load(path).save(path)
    assert [path.with_name(name).read_bytes() for name in NAMES] == before


def test_without_values_it_is_version_1(graph, path):
    """Over an old plan with values: its arrays stay, and are not picked up."""
    PruningPlan.of(graph, KEPT).save(path)
    document = json.loads(path.read_text())
    assert document["version"] == 1 and "values" not in document
    assert sorted(p.name for p in path.parent.iterdir()) == NAMES
    assert PruningPlan.load(path).values == {}


def test_old_files_load(model, tmp_path):
    """What version 1 wrote, to the letter."""
    structure = dict(tfprune.analyse(model).structure.layers)
    (tmp_path / "old.json").write_text(
        '{\n  "format": "tfprune plan",\n  "version": 1,\n  "fingerprint": "?",\n  "notes": {},\n'
        '  "groups": {\n    "conv0": {"width": 8, "kept": [1, 4, 5]}\n  },\n'
        f'  "model": {json.dumps(structure)}\n}}\n'
    )
    plan = PruningPlan.load(tmp_path / "old.json")
    assert plan.values == {} and plan.apply(model).get_layer("conv0").filters == 3


def test_files_that_move_together(plan, path, tmp_path):
    (tmp_path / "other").mkdir()
    for name in NAMES:
        path.with_name(name).rename(tmp_path / "other" / name)
    # The JSON may take another name: it says which arrays are its own.
    (tmp_path / "other" / NAMES[0]).rename(tmp_path / "other" / "new.json")
    assert PruningPlan.load(tmp_path / "other" / "new.json") == plan


def test_symbolic_links_are_followed(plan, tmp_path):
    (tmp_path / "real").mkdir()
    os.symlink(tmp_path / "real" / "plan.json", tmp_path / "link.json")
    plan.save(tmp_path / "link.json")
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == NAMES
    assert PruningPlan.load(tmp_path / "link.json") == plan


def test_taking_the_values_out_by_hand(plan, path):
    _edit(path, lambda document: document.pop("values"))
    loaded = PruningPlan.load(path)
    assert loaded.values == {} and loaded.kept == plan.kept


def test_channels_that_have_been_edited(path):
    """As many, but others: the shapes would fit, and the values would be wrong."""
    _edit(path, lambda document: document["groups"]["conv1"].update(kept=[0, 10]))
    with pytest.raises(tfprune.TfpruneError, match="have been edited"):
        PruningPlan.load(path)


def test_arrays_of_another_plan(graph, plan, path, tmp_path):
    other = plan.with_values(graph, {"norm1/gamma": [3.0, 4.0]})
    other = other.with_values(graph, {"norm1/gamma": np.array([3, 4], "float16")})
    other.save(tmp_path / "other.json")
    arrays = (tmp_path / "other.values.npz").read_bytes()
    assert len(arrays) == len(path.with_name(NAMES[1]).read_bytes())
    path.with_name(NAMES[1]).write_bytes(arrays)
    with pytest.raises(tfprune.TfpruneError, match="damaged or belongs to another plan"):
        PruningPlan.load(path)


def _missing(file):
    file.unlink()


def _a_folder(file):
    file.unlink()
    file.mkdir()


def _a_pipe(file):
    file.unlink()
    os.mkfifo(file)


def _cut(file):
    file.write_bytes(file.read_bytes()[:100])


def _without_end(file):
    file.write_bytes(file.read_bytes()[:-1])


def _one_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _padded(file):
    file.write_bytes(file.read_bytes() + bytes(100_000))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_missing, "is not there. Copy both files"),
        (_a_folder, "is not there"),
        (_a_pipe, "is not there"),  # reading one would wait for ever
        (_cut, r"100 bytes, where its arrays take 260: it is cut off"),
        (_without_end, "is damaged or belongs to another plan"),
        (_one_bit, "is damaged or belongs to another plan"),
        (_padded, r"bytes, where its arrays take 260"),
    ],
)
def test_damaged_arrays(path, spoil, message):
    assert sum(value.nbytes for value in VALUES.values()) == 260
    spoil(path.with_name(NAMES[1]))
    with pytest.raises(tfprune.TfpruneError, match=message):
        PruningPlan.load(path)


WHOLE = list(VALUES.items())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (WHOLE[:2], "lacks 'norm1/gamma'"),
        ([*WHOLE, ("conv1/bias", _normal(2))], "an array too many: 'conv1/bias'"),
        ([*WHOLE[:2], ("norm1/beta", _normal(2, dtype="float16"))], "lacks 'norm1/gamma'"),
        ([*WHOLE[1:], ("head/bias", _normal(5))], "float64 .5,., found float32"),
        ([*WHOLE[1:], ("head/bias", _normal(5, 1, dtype="float64"))], r"found float64 \(5, 1\)"),
        ([*WHOLE[1:], ("head/bias", np.array([None] * 5))], "found object"),
        ([*WHOLE[1:], ("head/bias", VALUES["head/bias"].astype(">f8"))], "found float64"),
        ([("conv1/kernel", np.asfortranarray(_normal(3, 3, 3, 2))), *WHOLE[:1], WHOLE[2]],
         "found float32"),
    ],
)  # fmt: skip
def test_other_arrays_under_the_right_checksum(path, arrays, message):
    _replace_arrays(path, arrays)
    with pytest.raises(tfprune.TfpruneError, match=message):
        PruningPlan.load(path)


def test_the_crafted_files_above_are_refused_for_their_contents(plan, path):
    _replace_arrays(path, WHOLE)
    assert PruningPlan.load(path) == plan


def test_an_array_twice(path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        _replace_arrays(path, [*WHOLE, WHOLE[0]])
    with pytest.raises(tfprune.TfpruneError, match="an array twice"):
        PruningPlan.load(path)


def test_compressed_arrays(path):
    """A few bytes could become many."""
    _replace_arrays(path, WHOLE, zipfile.ZIP_DEFLATED)
    with pytest.raises(tfprune.TfpruneError, match="a compressed array"):
        PruningPlan.load(path)


def test_a_header_that_promises_more_than_there_is(path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (5,)}
    )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, array in WHOLE[1:]:
            data = io.BytesIO()
            np.lib.format.write_array(data, array)
            archive.writestr(f"{name}.npy", data.getvalue())
        archive.writestr("head/bias.npy", header.getvalue() + bytes(8))
    _replace_content(path, buffer.getvalue())
    with pytest.raises(tfprune.TfpruneError, match=r"is damaged \(ValueError"):
        PruningPlan.load(path)


def test_bytes_that_are_no_archive(path):
    _replace_content(path, bytes(2000))
    with pytest.raises(tfprune.TfpruneError, match="BadZipFile"):
        PruningPlan.load(path)


@pytest.mark.parametrize(
    "name",
    ["../plan.values.npz", "sub/plan.values.npz", "..", ".", "", "plan.json", "a\\b.npz",
     "C:x.npz", "a\0.npz", "/plan.values.npz"],
)  # fmt: skip
def test_references_to_other_places(path, name):
    (path.parent / "sub").mkdir()
    for place in (path.parent.parent, path.parent / "sub"):
        (place / NAMES[1]).write_bytes(path.with_name(NAMES[1]).read_bytes())
    _edit(path, lambda document: document["values"].update(file=name))
    with pytest.raises(tfprune.TfpruneError, match="npz file of the same folder"):
        PruningPlan.load(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.update(values=[1]),
        lambda document: document.update(values=None),
        lambda document: document["values"].pop("file"),
        lambda document: document["values"].pop("sha256"),
        lambda document: document["values"].pop("channels"),
        lambda document: document["values"].pop("weights"),
        lambda document: document["values"].update(weights=["head/bias"]),
        lambda document: document["values"]["weights"]["head/bias"].update(shape="5"),
        lambda document: document["values"]["weights"]["head/bias"].update(shape=[5.0]),
        lambda document: document["values"]["weights"]["head/bias"].update(shape=[True] * 5),
        lambda document: document["values"]["weights"]["head/bias"].update(shape=[-5, -1]),
        lambda document: document["values"]["weights"]["head/bias"].update(shape=[10**4000] * 9),
        lambda document: document["values"]["weights"]["head/bias"].update(shape=[1] * 99),
        lambda document: document["values"]["weights"]["head/bias"].update(dtype="object"),
        lambda document: document["values"]["weights"]["head/bias"].update(dtype=["float64"]),
    ],
)
def test_entries_that_are_damaged(path, change):
    _edit(path, change)
    with pytest.raises(tfprune.TfpruneError, match=r'entry "values" with "file".*is damaged'):
        PruningPlan.load(path)


def test_shapes_that_no_file_holds(path):
    """No memory is taken for what a JSON says."""
    huge = [2**40, 2**40]
    _edit(path, lambda document: document["values"]["weights"]["head/bias"].update(shape=huge))
    with pytest.raises(tfprune.TfpruneError, match="it is cut off or belongs"):
        PruningPlan.load(path)


def test_values_in_a_plan_of_version_1(path):
    """An old tfprune would read it and drop the values without a word."""
    _edit(path, lambda document: document.update(version=1))
    with pytest.raises(tfprune.TfpruneError, match='version 1 without an entry "values"'):
        PruningPlan.load(path)


def test_names_that_no_file_has(path):
    """Half a surrogate pair is JSON, but no text."""
    _edit(path, lambda document: document["values"]["weights"].update(
        {"\ud800/bias": {"shape": [5], "dtype": "float16"}}
    ))  # fmt: skip
    with pytest.raises(tfprune.TfpruneError, match="lacks"):
        PruningPlan.load(path)
    _edit(path, lambda document: document["values"].update(file="\ud800.npz"))
    with pytest.raises(tfprune.TfpruneError, match="is not there"):
        PruningPlan.load(path)


def test_json_that_is_too_large(path, monkeypatch):
    size = path.stat().st_size
    monkeypatch.setattr("tfprune.graph.plan._MOST_BYTES", size)
    assert PruningPlan.load(path).values
    monkeypatch.setattr("tfprune.graph.plan._MOST_BYTES", size - 1)
    with pytest.raises(tfprune.TfpruneError, match="is larger"):
        PruningPlan.load(path)


def test_json_that_goes_too_deep(tmp_path):
    (tmp_path / "plan.json").write_text("[" * 200_000)
    with pytest.raises(tfprune.TfpruneError, match="damaged or no JSON"):
        PruningPlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("spot", ["plan._dump", "values.channels_digest"])
@pytest.mark.parametrize("stop", [ZeroDivisionError, KeyboardInterrupt])
def test_nothing_half_written_stays(graph, plan, path, monkeypatch, spot, stop):
    """Neither where there was nothing nor where there was a plan."""
    before = {name: path.with_name(name).read_bytes() for name in NAMES}
    other = plan.with_values(graph, {"norm1/gamma": [3.0, 4.0]})

    def interrupted(*_):
        raise stop

    with monkeypatch.context() as patched:
        patched.setattr(f"tfprune.graph.{spot}", interrupted)
        for name in ("plan.json", "new.json"):
            with pytest.raises(stop):
                other.save(path.with_name(name))
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before
    assert PruningPlan.load(path) == plan


def test_places_that_cannot_be_written(plan, tmp_path):
    (tmp_path / NAMES[1]).mkdir()
    with pytest.raises(tfprune.TfpruneError, match="Received a directory"):
        plan.save(tmp_path / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == [NAMES[1]]
