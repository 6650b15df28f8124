"""README.md says nothing that is not there: numbers, links, names, commands."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import typer

import fpsc
from fpsc.cli import app

NAMES = (
    *("benchmarks", "developing", "joint", "patterns", "policy", "quality", "tiles", "trainers"),
    *("training", "training-data", "tune", "unmeasured"),
)
PAGES = ("README.md", *(f"docs/{name}.md" for name in NAMES))


@pytest.fixture(scope="module")
def readme(checkout: Path) -> str:
    return (checkout / "README.md").read_text(encoding="utf-8")


def test_numbers_stand_between_markers(readme: str) -> None:
    """tests/bench/test_tables.py compares what is between them with the committed JSON."""
    source = r"bench/results/(?:\w+\.json|joint#\w+)"
    marked = rf"<!-- table: {source} -->\n((?:\|.*\n|\n)*)<!-- end of table -->"
    found, rest = re.findall(marked, readme), re.sub(marked, "", readme)
    assert found and all(found)
    assert not re.findall(r"^\|.*\n", rest, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str, checkout: Path) -> None:
    path = checkout / page
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_use_what_exists(page: str, checkout: Path) -> None:
    text = (checkout / page).read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        ast.parse(code)
    for name in re.findall(r"\bfpsc\.([A-Z]\w*|\w+(?=\())", text):
        assert hasattr(fpsc, name), name


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_valid(page: str, checkout: Path) -> None:
    """They and their options exist; what they do is tested elsewhere."""
    text = (checkout / page).read_text(encoding="utf-8")
    lines = re.findall(r"^ {4}fpsc (.*?)(?:#.*)?$|`fpsc ([^`]*)`", text, re.MULTILINE)
    assert lines or page not in ("README.md", "docs/policy.md")
    for line in lines:
        words = [word for word in "".join(line).split() if word != "--help"]
        command: Any = typer.main.get_command(app)
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= known, line
