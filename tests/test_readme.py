"""README.md says nothing that is not there: numbers, links, names, commands."""

import ast
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fpsc
from fpsc.cli import app

NAMES = ("developing", "patterns", "policy", "quality", "report", "tiles", "unmeasured")
PAGES = ("README.md", *(f"docs/{name}.md" for name in NAMES))


@pytest.fixture(scope="module")
def readme(checkout: Path) -> str:
    return (checkout / "README.md").read_text(encoding="utf-8")


def test_numbers_are_those_of_the_committed_json(readme: str, checkout: Path) -> None:
    measured = json.loads((checkout / "bench/results/cpu_attention.json").read_text())["keep"]
    rows = re.findall(r"^\| ([\d.]+) \|(.+)\|$", readme, re.MULTILINE)
    assert rows
    names = ("fpsc", "flex, padded", "flex, tile that divides the grid")
    for keep, cells in rows:
        speedups = [measured[keep]["contenders"][name]["speedup"]["median"] for name in names]
        assert cells.split("|") == [f" {speedup:.1f}x " for speedup in speedups]


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


def test_inspect_commands_are_valid(readme: str) -> None:
    """Their options exist; what they do is tested elsewhere."""
    commands = re.findall(r"^ {4}fpsc (\w+)(.*)$", readme, re.MULTILINE)
    assert {name for name, _ in commands} == {"compare", "demo", "inspect"}
    for name, options in commands:
        known = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        assert all(option in known for option in re.findall(r"--[\w-]+", options))
