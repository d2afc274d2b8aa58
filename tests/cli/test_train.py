"""tfprune train."""

from __future__ import annotations

import json

import pytest

from tfprune.cli.main import OK, REFUSED, USAGE, main

SMALL = ["--method", "slimming", "--model", "resnet8_digits", "--dataset", "digits",
         "--set", "train.epochs=1", "--set", "fine_tune={}", "--set", "network.widths=[4, 6, 8]",
         "--set", "data.subset=150"]  # fmt: skip


def test_recipes_are_listed(capsys) -> None:
    assert main(["train", "--list"]) == OK
    assert "slimming-vgg19-cifar10\n  Network Slimming" in capsys.readouterr().out
    assert main(["train", "--list", "--json"]) == OK
    assert "csgd-resnet56-cifar10" in json.loads(capsys.readouterr().out)


def test_a_small_training(tmp_path, capsys) -> None:
    folder = tmp_path / "out"
    assert main(["train", *SMALL, "--output", str(folder)]) == OK
    out, err = capsys.readouterr()
    assert "slimming of resnet8_digits on digits" in out and "pruned" in out
    assert "train 1: loss" in err and "MACs left" in err
    # finished already: nothing is trained again
    assert main(["train", *SMALL, "--output", str(folder), "--json"]) == OK
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["macs"][1] <= 0.5 * report["macs"][0] and "train 1" not in err
    assert (folder / "pruned.keras").exists()
    # another recipe in the same folder
    assert main(["train", *SMALL, "--set", "seed=1", "--output", str(folder)]) == REFUSED
    assert "another seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--method", "slimming"],
        ["--recipe", "slimming-vgg19-cifar10", "--model", "vgg16"],
        ["--recipe", "slimming-vgg19-cifar10", "--set", "epochs"],
    ],
    ids=range(4),
)
def test_wrong_usage(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", *arguments])
    assert stopped.value.code == USAGE
    assert "expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "nothing"], "Expected recipe as one of"),
        (["--recipe", "slimming-vgg19-cifar10", "--set", "train.epoch=2"], "train only epochs"),
        (["--method", "magic", "--model", "vgg16", "--dataset", "digits"], "Expected method"),
        (["--method", "slimming", "--model", "none.keras", "--dataset", "digits"], "none.keras"),
    ],
    ids=range(4),
)
def test_what_is_refused(arguments, message, tmp_path, capsys) -> None:
    folder = tmp_path / "out"
    assert main(["train", *arguments, "--output", str(folder)]) == REFUSED
    assert message in capsys.readouterr().err
    assert not folder.exists()
