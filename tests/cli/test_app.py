"""The command line as a whole: start-up, version, and how errors look."""

import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fpsc.cli import app

COMMANDS = ("compare", "demo", "encode", "inspect", "tune", "version")


def run_python(code: str, cwd: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    "arguments", [["--help"], ["inspect", "--help"], ["demo", "--help"], ["encode", "--help"]]
)
def test_help_does_not_import_torch(arguments: list[str], checkout: Path) -> None:
    printed = run_python(
        "import sys; from fpsc.cli import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        "print('torch' in sys.modules, 'diffusers' in sys.modules)",
        checkout,
    )
    assert printed.splitlines()[-1] == "False False"


def test_help_names_every_command() -> None:
    printed = CliRunner().invoke(app, ["--help"]).output
    assert all(f" {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_prints_json(command: str) -> None:
    assert "--json" in CliRunner().invoke(app, [command, "--help"]).output


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.output.split() == ["fpsc", metadata.version("fpsc")]


def test_version_command_as_json() -> None:
    result = CliRunner().invoke(app, ["version", "--json"])
    found = json.loads(result.output)
    assert result.exit_code == 0
    assert found["torch"] == metadata.version("torch")
    assert found["backend_registered"] is True


def test_unknown_command_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["inspekt"])
    assert result.exit_code == 2
    assert "inspekt" in result.output
    assert "Traceback" not in result.output
