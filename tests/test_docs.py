"""Every example runs: those in the docstrings, in the README and in the pages of ``docs``.

In a page, blocks marked ``python`` are run in order, in one namespace; lines of ``console`` blocks that begin with
``purecnn`` are run by the command line. Both in a folder of their own, in which the page may leave files. Blocks marked
``python compiler`` are run where there is a compiler of C++.
"""

import ast
import doctest
import importlib
import pkgutil
import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import converters
import purecnn
from converters.cli import app
from tests.table import COMPILER

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(
    module.name
    for package in (purecnn, converters)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)
BLOCK = re.compile(r"^```(python|python compiler|console)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("purecnn.")])
def test_docstrings_tell_of_errors(name: str) -> None:
    """Of all that a public function, or what it makes, raises itself."""
    file = importlib.import_module(name).__file__
    assert file is not None
    outside = ast.parse(Path(file).read_text()).body
    inside = [node for each in outside if isinstance(each, ast.ClassDef) for node in each.body]
    public = [
        node for node in (*outside, *inside) if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    raising = [node for node in public if any(isinstance(each, ast.Raise) and each.exc for each in ast.walk(node))]
    assert [node.name for node in raising if "Raises:" not in (ast.get_docstring(node) or "")] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace: dict[str, object] = {}
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        kind, code = block.groups()
        if kind == "python compiler" and not COMPILER:
            continue
        if kind != "console":
            # The empty lines let an error name the line in the page.
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
        else:
            for command in code.splitlines():
                if command.startswith("purecnn "):
                    result = CliRunner().invoke(app, shlex.split(command, comments=True)[1:], catch_exceptions=False)
                    assert result.exit_code == 0, f"{page.name}, line {line}: {command}\n{result.output}"


def test_the_reference_says_what_the_docstrings_say() -> None:
    """Else run ``python docs/make_reference.py``."""
    page = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["page"]()
    assert (ROOT / "docs" / "reference.md").read_text() == page
    assert "|  |" not in page  # each has a docstring


def test_readme_has_the_test_command() -> None:
    """What CI runs is what the README tells a newcomer to run."""
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert command in (ROOT / "README.md").read_text()
