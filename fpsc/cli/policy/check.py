"""`fpsc policy check`: is a file a policy, and if not, where and why not."""

import json as jsonlib
from typing import Annotated, Any

import typer
from rich.console import Console

from fpsc.cli.errors import NOTHING_FOUND


def check(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Files, or names of built-in policies.")
    ],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check policies: every problem with its line, its column and the way out.

    Exit status: 0 where all are valid, 1 where one is not.
    """
    found = [_checked(name) for name in files]
    valid = all(not entry["problems"] for entry in found)
    if json:
        typer.echo(jsonlib.dumps({"valid": valid, "files": found}))
    else:
        _show(found)
    if not valid:
        raise typer.Exit(NOTHING_FOUND)


def _checked(name: str) -> dict[str, Any]:
    """What is to be said about one file, as plain values."""
    from fpsc.policy import PolicyError, find

    try:
        policy = find(name)
    except PolicyError as error:
        return {
            "file": error.file,
            "problems": [
                {
                    "file": p.file or error.file,
                    "line": p.line,
                    "column": p.column,
                    "message": p.message,
                }
                for p in error.problems
            ],
        }
    return {
        "file": policy.source,
        "name": policy.name,
        "modes": list(policy.modes),
        "phases": len(policy.schedule),
        "rules": len(policy.rules),
        "problems": [],
    }


def _show(found: list[dict[str, Any]]) -> None:
    console = Console(soft_wrap=True)
    for entry in found:
        for problem in entry["problems"]:
            place = ":".join(
                str(part)
                for part in (problem["file"], problem["line"], problem["column"])
                if part is not None
            )
            console.print(f"{place}: {problem['message']}", style="red", markup=False)
        if not entry["problems"]:
            console.print(
                f"{entry['file']}: valid; policy {entry['name']}, modes "
                f"{', '.join(entry['modes'])}, {entry['phases']} phases, {entry['rules']} rules",
                style="green",
                markup=False,
                highlight=False,
            )
