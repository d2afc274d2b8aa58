"""The README's Python runs as it stands, and its commands exist."""

import re
import textwrap
from pathlib import Path

import pytest

from tfprune.cli.main import build_parser

ROOT = Path(__file__).parents[2]
DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def blocks(document, language):
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.findall(rf"^ *```{language}\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_run(document, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    # The blocks of one document build on each other, as its reader would run them.
    for code in blocks(document, "python"):
        exec(compile(code, document, "exec"), namespace)


def test_the_readme_has_code():
    assert blocks("README.md", "python")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_are_understood(document):
    lines = [
        line.partition("#")[0].strip()
        for block in blocks(document, "bash")
        for line in block.splitlines()
    ]
    parser = build_parser()
    for line in lines:
        if line.startswith("tfprune "):
            parser.parse_args(line.split()[1:])  # exits, and so fails, on what it does not know
