"""Commands as a person runs them: in a process of their own, with real streams and signals."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from tfprune import criteria
from tfprune.graph.plan import PruningPlan

from .conftest import Outcome, command

COMMANDS = ("inspect", "prune", "export", "benchmark", "compare", "demo")
HEAVY = ("tensorflow", "keras", "tf_keras", "matplotlib", "rich", "scipy", "numpy")


@pytest.mark.parametrize("module", ["tfprune", "tfprune.cli.main"])
def test_no_arguments(module) -> None:
    outcome = command(module=module)
    assert outcome.code == 2 and outcome.err == ""
    assert all(name in outcome.out for name in COMMANDS)


def test_version() -> None:
    from importlib.metadata import version

    assert command("--version").out == f"tfprune {version('tfprune')}\n"


def test_help_is_readable_and_imports_nothing_heavy() -> None:
    """All in one process: what the first loads, the last would show."""
    program = (
        "import sys\n"
        "from tfprune.cli.main import main\n"
        f"for name in {COMMANDS!r}:\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as error: assert error.code == 0\n"
        f"print('LOADED', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    *text, loaded = done.stdout.splitlines()
    assert loaded == "LOADED []" and done.stderr == ""
    assert max(map(len, text)) <= 80
    for name in COMMANDS:
        assert any(line.startswith(f"usage: tfprune {name} ") for line in text)
        assert any(line.startswith(f"example: tfprune {name}") or line == f"example: tfprune {name}"
                   for line in text)  # fmt: skip
    words = set(" ".join(text).replace(",", " ").split())
    assert words >= set(criteria.names())


def test_a_mistyped_name_is_known_before_anything_heavy_is_loaded(tmp_path) -> None:
    program = (
        "import sys\n"
        "from tfprune.cli.main import main\n"
        "code = main(['prune', 'nets.keras', 'small.keras', '--ratio', '0.5'])\n"
        f"print(code, [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout == "1 []\n"
    assert "Received: 'nets.keras', which does not exist." in done.stderr


def test_every_command_is_quiet(files, tmp_path) -> None:
    """Standard error is for errors: TensorFlow, Keras and LiteRT stay silent where all is well.

    One process for all, as every start of TensorFlow takes seconds. An error is one line.
    """
    net, small, lite = files / "net.keras", tmp_path / "small.h5", tmp_path / "small.tflite"
    commands = (
        ("inspect", net),
        ("prune", net, small, "--ratio", 0.5),
        ("export", small, lite, "--quantize", "int8", "--calibration", "digits"),
        ("compare", net, lite, "--runs", 2, "--data", "digits"),
        ("inspect", "missing.keras"),
    )
    program = (
        "from tfprune.cli.main import main\n"
        f"for arguments in {[[str(word) for word in words] for words in commands]!r}:\n"
        "    print('CODE', main(arguments))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    ends = re.compile(r"^CODE (\d)\n", re.MULTILINE)
    assert ends.findall(run.stdout) == ["0", "0", "0", "0", "1"]
    reports = ends.sub("CODE\n", run.stdout).split("CODE\n")
    assert [bool(report) for report in reports] == [True, True, True, True, False, False]
    assert run.stderr == (
        "tfprune inspect: Expected a model file. Received: 'missing.keras', which does not exist.\n"
    )
    assert {path.name for path in tmp_path.iterdir()} == {"small.h5", "small.tflite"}


def test_a_reader_that_leaves(files) -> None:
    """As `tfprune inspect | head -1` does."""
    run = subprocess.Popen(
        [sys.executable, "-m", "tfprune", "inspect", str(files / "net.keras")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None and run.stderr is not None
    run.stdout.close()
    assert run.stderr.read() == ""
    run.stderr.close()
    assert run.wait(60) == 0


def _at_a_terminal(*arguments: object) -> str:
    """What a command shows on standard error if that is a terminal."""
    primary, secondary = pty.openpty()
    run = subprocess.Popen(
        [sys.executable, "-m", "tfprune", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=secondary,
    )
    os.close(secondary)
    shown = b""
    # A terminal whose other side has been closed reads as an I/O error.
    with contextlib.suppress(OSError):
        while chunk := os.read(primary, 4096):
            shown += chunk
    os.close(primary)
    assert run.wait(60) == 0
    return shown.decode()


def test_progress_at_a_terminal_only_if_wanted(files, tmp_path) -> None:
    arguments = ("export", files / "net.keras", tmp_path / "net.tflite")
    assert "done" in _at_a_terminal(*arguments)
    assert _at_a_terminal(*arguments, "--quiet") == ""


def _interrupted(word: str, later: float, *arguments: object) -> Outcome:
    """Sends Ctrl-C some seconds after a word has appeared on standard error."""
    run = subprocess.Popen(
        [sys.executable, "-m", "tfprune", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.stderr is not None
    seen = ""
    while word not in seen and (line := run.stderr.readline()):
        seen += line
    assert word in seen
    time.sleep(later)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=120)
    return Outcome(run.returncode, out, seen + err)


@pytest.mark.slow
def test_interrupted_in_training(tmp_path) -> None:
    folder = tmp_path / "made"
    # five seconds: the graph is built and the epochs run
    outcome = _interrupted("• train", 5, "demo", "--output", folder, "--epochs", 500)
    assert outcome.code == 130 and outcome.out == ""
    assert outcome.err.endswith("tfprune demo: interrupted; nothing half-written is left.\n")
    assert "Traceback" not in outcome.err
    assert not folder.exists() or list(folder.iterdir()) == []


def test_an_interrupt_that_a_library_turns_into_an_error(files) -> None:
    """As TensorFlow's scopes do in the middle of a trace; and they complain when collected."""
    program = (
        "import contextlib, os, signal, sys\n"
        "from tfprune.cli import commands, main\n"
        "def scope():\n"
        "    try: yield\n"
        "    finally: raise RuntimeError('left without proper nesting')\n"
        "def inspect(options):\n"
        "    left = scope()\n"
        "    next(left)\n"
        "    with contextlib.contextmanager(scope)():\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "commands.inspect = inspect\n"
        f"sys.exit(main.main(['inspect', {str(files / 'net.keras')!r}]))\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 130 and run.stdout == ""
    assert run.stderr == "tfprune inspect: interrupted; nothing half-written is left.\n"


@pytest.mark.slow
def test_interrupted_in_tuning(tmp_path) -> None:
    """Training is over: what is written by now is whole, and nothing else is there."""
    import keras

    folder = tmp_path / "made"
    outcome = _interrupted(
        "• fine-tune", 1, "demo", "--output", folder, "--epochs", 6, "--subset", 200
    )
    assert outcome.code == 130
    assert {path.name for path in folder.iterdir()} == {"dense.keras", "plan.json"}
    keras.saving.load_model(folder / "dense.keras")
    PruningPlan.load(folder / "plan.json")


def test_interrupted_at_any_moment(files, tmp_path) -> None:
    """From the first import to the last write: whole files or none, never a stack of frames."""
    source = files / "net.keras"
    for delay in (0.3, 1.0, 2.0, 3.0):
        run = subprocess.Popen(
            [sys.executable, "-m", "tfprune", "prune", str(source), str(tmp_path / "small.keras"),
             "--ratio", "0.5"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        time.sleep(delay)
        run.send_signal(signal.SIGINT)
        err = run.communicate(timeout=60)[1]
        # An interrupt inside exec(), which imports use, makes Python end by the signal itself,
        # whatever exit code it is given; a shell shows 130 all the same.
        assert run.returncode in (0, 130, -signal.SIGINT), (delay, err)
        assert "Traceback" not in err, delay
        assert {path.name for path in tmp_path.iterdir()} <= {"small.keras"}
