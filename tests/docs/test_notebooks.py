"""The notebooks run as they stand, with a small setting in place of the full one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "colab"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

SMALL = {
    "01_quickstart": {"EPOCHS": 1, "FINE_TUNE_EPOCHS": 1, "SUBSET": 150},
    "02_sparsity": {"EPOCHS": 1, "PRUNE_EPOCHS": 2, "SPARSITIES": (0.8,), "SUBSET": 400},
    "03_training": {
        "EPOCHS": 1,
        "METHOD_EPOCHS": 2,
        "FINE_TUNE_EPOCHS": 1,
        "SUBSET": 300,
        "METHODS": ("slimming", "SSS"),
        "SCRATCH": ("slimming",),
    },
}


def _read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def _parameters(notebook: Any) -> int:
    """The index of the one cell that is tagged as the settings, as papermill has it."""
    (index,) = [
        number
        for number, cell in enumerate(notebook.cells)
        if "parameters" in cell.metadata.get("tags", [])
    ]
    return index


def _run(name: str, folder: Path) -> Any:
    """Executes a notebook in a folder, its settings followed by the small ones."""
    notebook = _read(name)
    index = _parameters(notebook)
    settings = notebook.cells[index].source
    for key in SMALL[name]:
        assert f"\n{key} = " in f"\n{settings}", f"{key} is no setting of the notebook"
    small = "\n".join(f"{key} = {value!r}" for key, value in SMALL[name].items())
    notebook.cells.insert(index + 1, nbformat.v4.new_code_cell(small))
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return notebook


def _printed(cells: list[Any]) -> str:
    return "\n".join(
        output.get("text", "") for cell in cells for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )  # fmt: skip


def _images(cell: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_every_notebook_has_a_small_setting() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(SMALL)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_without_outputs(path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.slow
def test_quickstart(tmp_path) -> None:
    notebook = _run("01_quickstart", tmp_path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    text = _printed(code)
    assert "Assets written" not in text and "INFO" not in text
    assert "channel groups can be pruned" in text and "masked equals pruned" in text
    assert [_images(cell) for cell in code if "figures." in cell.source] == [1, 1, 1, 1]
    (table,) = [
        output.data["text/markdown"]
        for cell in code
        for output in cell.outputs
        if "text/markdown" in output.get("data", {})
    ]
    assert "| pruned int8 |" in table and "top-1 on 360 examples" in table
    files = {path.name: path.stat().st_size for path in (tmp_path / "quickstart").iterdir()}
    assert set(files) == {
        "small.keras", "dense.tflite", "dense_int8.tflite", "pruned.tflite", "pruned_int8.tflite",
    }  # fmt: skip
    assert files["pruned.tflite"] < files["dense.tflite"]
    # one byte a weight instead of four, and some bytes for scales and structure
    assert files["pruned_int8.tflite"] < files["pruned.tflite"] / 2
    runner = Interpreter(str(tmp_path / "quickstart" / "pruned_int8.tflite"))
    outputs = runner.get_signature_runner("serving_default")(image=np.zeros((1, 8, 8, 1), "f4"))
    assert next(iter(outputs.values())).shape == (1, 10)


@pytest.mark.slow
def test_sparsity(tmp_path) -> None:
    notebook = _run("02_sparsity", tmp_path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    text = _printed(code)
    # to one weight per kernel: that of the first convolution has 144 weights
    assert "80% asked, 80.0" in text and "SNIP, trained from scratch: 80.0% zeros" in text
    assert "channels can be removed without changing the outputs" in text
    assert [_images(cell) for cell in code if "schedule_figure(" in cell.source] == [1]
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "sparsity").iterdir()}
    assert set(sizes) == {"0%.tflite", "80%.tflite", "80%_sparse.tflite"}
    assert sizes["80%_sparse.tflite"] < 0.6 * sizes["80%.tflite"]


@pytest.mark.slow
def test_training(tmp_path) -> None:
    notebook = _run("03_training", tmp_path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    text = _printed(code)
    assert "channel groups can be pruned" in text and "can be removed whole" in text
    assert text.count(", tuned ") == 2 and text.count("from scratch") == 1
    assert [_images(cell) for cell in code if "structure_figure(" in cell.source] == [1]
    share = re.search(r"slimming +(\d+)% of the MACs", text)
    assert share and 40 <= int(share[1]) <= 50
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "training").iterdir()}
    assert set(sizes) == {
        "dense.tflite", "slimming.tflite", "SSS.tflite", "L1.tflite",
    }  # fmt: skip
    assert max(sizes, key=sizes.get) == "dense.tflite"
