"""The commands and their options (imports nothing heavy: ``--help`` is instant)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from tfprune.cli import values

_REQUEST = (
    "ratio", "macs", "params", "size_bytes", "criterion", "order", "round_to", "min_channels",
    "ignore",
)  # fmt: skip


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ``command`` is ``None`` where none was named.

    Raises:
        SystemExit: for ``--help``, ``--version`` and wrong usage, as argparse does.
    """
    options = build_parser().parse_args(arguments)
    if options.command == "prune":
        _check_prune(options)
    if options.command == "train":
        _check_train(options)
    return options


def request_of(options: argparse.Namespace) -> dict[str, Any]:
    """What ``prune`` is asked for, as arguments of :func:`tfprune.plan`; defaults are left out."""
    names = {"ratio": "pruning_ratio"}
    given = {name: getattr(options, name) for name in _REQUEST}
    return {names.get(k, k): v for k, v in given.items() if v is not None and v != []}


def _check_train(options: argparse.Namespace) -> None:
    named = [name for name in ("method", "model", "dataset") if getattr(options, name)]
    if options.list:
        return
    if options.recipe and named:
        options.wrong_usage(f"expected --recipe alone, or with --set; received also --{named[0]}")
    if not options.recipe and len(named) < 3:
        options.wrong_usage("expected --recipe, or --method, --model and --dataset")


def _check_prune(options: argparse.Namespace) -> None:
    """Contradictions are told before TensorFlow is loaded."""
    if options.output is None and not options.dry_run:
        options.wrong_usage("expected OUTPUT, the .keras file to write, or --dry-run")
    given = [name for name in _REQUEST if getattr(options, name) not in (None, [])]
    flags = ", ".join("--" + name.replace("_", "-") for name in given)
    if options.plan is not None:
        if given or options.data is not None:
            options.wrong_usage(
                f"expected either --plan or a request; received --plan and {flags or '--data'}"
            )
        return
    budgets = [name for name in ("macs", "params", "size_bytes") if name in given]
    if (options.ratio is None) == (not budgets):
        options.wrong_usage(
            "expected what to remove: --ratio 0.5, or a budget such as --macs 0.5, or a --plan"
            if not budgets
            else f"expected either --ratio or budgets; received {flags}"
        )


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="tfprune",
        description="Makes trained Keras networks smaller and faster for phones.",
        epilog="Start with 'tfprune demo', then 'tfprune inspect model.keras'.",
    )
    from importlib.metadata import version

    parser.add_argument("--version", action="version", version=f"tfprune {version('tfprune')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    inspect = _command(
        commands,
        "inspect",
        "show which channels can be removed, and why others cannot",
        "tfprune inspect model.keras",
    )
    _model(inspect)
    inspect.add_argument("--layers", action="store_true", help="also list the cost of every layer")

    prune = _command(
        commands,
        "prune",
        "remove channels and write a smaller model",
        "tfprune prune model.keras small.keras --macs 0.5",
    )
    _model(prune)
    prune.add_argument(
        "output", metavar="OUTPUT", nargs="?", help="the .keras file to write (not for --dry-run)"
    )
    prune.add_argument(
        "--ratio",
        type=values.fraction,
        metavar="R",
        help="fraction of every group's channels to remove, such as 0.5",
    )
    for name, what in (
        ("macs", "multiply-accumulates"),
        ("params", "parameters"),
        ("size-bytes", "bytes of weights"),
    ):
        prune.add_argument(
            f"--{name}",
            type=values.amount,
            metavar="N",
            help=f"at most this many {what}: a fraction (0.5) or a number",
        )
    prune.add_argument(
        "--criterion",
        metavar="NAME",
        help="what a channel is worth: l1 (default), greedy_l1, l2, bn_scale, fpgm, group_norm, "
        "random, and with --data taylor, activation_mean, apoz, hrank, chip, nisp, influence, ccp, "
        "aofp, thinet, lasso",
    )
    prune.add_argument(
        "--data", metavar="NAME", help="data set for criteria that need one: digits, cifar10, …"
    )
    prune.add_argument(
        "--order",
        choices=("uniform", "global"),
        help="all groups alike (default), or the lowest scores first",
    )
    prune.add_argument(
        "--round-to",
        type=values.multiple,
        metavar="N",
        help="keep multiples of N channels (default 8), or a target: cpu_fp32, "
        "cpu_fp16, cpu_int8, gpu, gpu_large",
    )
    prune.add_argument(
        "--min-channels",
        type=values.positive,
        metavar="N",
        help="fewest channels that a group keeps (default 1)",
    )
    prune.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="NAME",
        help="group or layer, or a pattern, whose channels stay; repeatable",
    )
    prune.add_argument("--plan", metavar="FILE", help="apply this plan instead of making one")
    prune.add_argument("--save-plan", metavar="FILE", help="also write the plan as JSON")
    prune.add_argument("--dry-run", action="store_true", help="show the plan, write no model")

    export = _command(
        commands,
        "export",
        "write a LiteRT (.tflite) file and check it against the model",
        "tfprune export small.keras small.tflite --quantize int8 --calibration cifar10",
    )
    _model(export)
    export.add_argument("output", metavar="OUTPUT", help="the .tflite file to write")
    export.add_argument(
        "--quantize",
        choices=("float16", "dynamic", "int8"),
        help="store smaller numbers; int8 needs --calibration",
    )
    export.add_argument(
        "--calibration",
        metavar="DATA",
        help="for int8: name of a data set (its training images), or an .npy "
        "file of typical inputs",
    )
    export.add_argument(
        "--sparse",
        action="store_true",
        help="store pruned kernels without their zeros: a smaller file, and faster on "
        "phones where the report says so; not with dynamic or int8",
    )

    benchmark = _command(
        commands,
        "benchmark",
        "measure CPU latency, and try the GPU delegate for real",
        "tfprune benchmark dense.tflite small.tflite",
    )
    benchmark.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help=".tflite, .keras or .h5 files, measured side by side",
    )
    benchmark.add_argument(
        "--threads", type=values.positive, default=1, metavar="N", help="default 1"
    )
    benchmark.add_argument(
        "--runs", type=values.positive, default=50, metavar="N", help="default 50"
    )
    benchmark.add_argument(
        "--warmup", type=values.natural, default=10, metavar="N", help="default 10"
    )
    benchmark.add_argument("--profile", action="store_true", help="time every operation alone")
    _gpu(benchmark)

    compare = _command(
        commands,
        "compare",
        "one table: accuracy, MACs, bytes, latency, GPU delegation",
        "tfprune compare dense=model.keras pruned=small.keras --data digits",
    )
    compare.add_argument(
        "models",
        nargs="+",
        metavar="NAME=MODEL",
        help="the first is what the others are compared with",
    )
    compare.add_argument("--data", metavar="NAME", help="data set whose test images to score")
    compare.add_argument("--runs", type=values.positive, default=50, metavar="N", help="default 50")
    compare.add_argument("--markdown", action="store_true", help="print a Markdown table")
    _gpu(compare)

    train = _command(
        commands,
        "train",
        "train by a method that finds the channels to remove, from a recipe",
        "tfprune train --method slimming --model vgg19 --dataset cifar10",
    )
    train.add_argument(
        "--recipe", metavar="NAME", help="a recipe by name (see --list), or a .toml file"
    )
    train.add_argument("--list", action="store_true", help="list the recipes and leave")
    train.add_argument("--method", metavar="NAME", help="slimming, sfp, gdp, …")
    train.add_argument(
        "--model", metavar="NAME", help="vgg16, resnet20, densenet40, …, or a .keras or .h5 file"
    )
    train.add_argument("--dataset", metavar="NAME", help="digits, cifar10, fashion_mnist, …")
    train.add_argument(
        "--set",
        action="append",
        default=[],
        type=values.setting,
        metavar="KEY=VALUE",
        help="change the recipe, such as train.epochs=20, arguments.macs=0.5, data.subset=10000, "
        "seed=1; repeatable",
    )
    train.add_argument(
        "--output",
        default="tfprune-train",
        metavar="DIR",
        help="folder for models, plan and report (default tfprune-train); the same command goes "
        "on where it was interrupted",
    )

    demo = _command(
        commands,
        "demo",
        "train, prune, fine-tune, export and compare, on handwritten digits",
        "tfprune demo",
    )
    demo.add_argument(
        "--dataset",
        default="digits",
        metavar="NAME",
        help="digits (default, nothing to download), or cifar10, fashion_mnist, … through TFDS",
    )
    demo.add_argument(
        "--output",
        default="tfprune-demo",
        metavar="DIR",
        help="folder for models and plots (default tfprune-demo)",
    )
    demo.add_argument(
        "--epochs",
        type=values.positive,
        default=20,
        metavar="N",
        help="of training (default 20); fine-tuning takes half",
    )
    demo.add_argument(
        "--subset", type=values.positive, metavar="N", help="use only N training images"
    )
    demo.add_argument("--seed", type=values.natural, default=0, metavar="N", help="default 0")
    _gpu(demo)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    text: str,
    example: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", epilog=f"example: {example}"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.add_argument(
        "--debug",
        action="store_true",
        help="show what TensorFlow and Keras say, and where an unexpected error comes from",
    )
    parser.set_defaults(wrong_usage=parser.error)
    return parser


def _model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_file", metavar="MODEL", help="a .keras or .h5 file")
    parser.add_argument(
        "--input-shape",
        type=values.shape,
        metavar="H,W,C",
        help="size of one input, for a model that leaves it open",
    )


def _gpu(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--gpu",
        dest="gpu",
        action="store_const",
        const=True,
        default="auto",
        help="run on the GPU delegate (default: where a driver is found)",
    )
    group.add_argument(
        "--no-gpu", dest="gpu", action="store_const", const=False, help="leave the GPU delegate out"
    )
