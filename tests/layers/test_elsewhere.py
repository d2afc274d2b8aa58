"""The rest of tfprune asks for models without wrappers, and says so."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tfprune
from tests.layers.twins import dense, pair
from tfprune.errors import ModelError
from tfprune.loading import load_model


@pytest.mark.parametrize("number", [0, 1], ids=["Keras 3", "tf_keras"])
@pytest.mark.parametrize("function", [tfprune.analyse, tfprune.surgery.remove_zero_channels])
def test_analysis_and_surgery(function, number) -> None:
    wrapped = tfprune.prune_low_magnitude(pair(dense)[number])
    with pytest.raises(ModelError, match=r"'prune_low_magnitude_\w+'.*strip_pruning"):
        function(wrapped)
    assert function(tfprune.strip_pruning(wrapped)) is not None


def test_the_command_line(tmp_path) -> None:
    path = tmp_path / "wrapped.keras"
    tfprune.prune_low_magnitude(pair(dense)[0]).save(path)
    # a process that has not imported the wrapper
    program = (
        f"import sys; from tfprune.cli.main import main; sys.exit(main(['inspect', {str(path)!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "tfprune.strip_pruning(model)" in done.stderr
    assert "Traceback" not in done.stderr
    # in this one Keras knows the wrapper, so the model loads
    assert "prune_low_magnitude_hidden" in [layer.name for layer in load_model(path).layers]
