"""`fpsc bench report`: records as one HTML page."""

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from fpsc.cli.errors import UserError

Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Records of `fpsc bench`.")]


def report(
    files: Files,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The page; an older one is replaced.")
    ] = Path("report.html"),
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write one HTML page of records: speeds beside errors, steps, splits, scaling, environment.

    The page needs no network and no other file. Exit status: 0; 2 for a file that is no record,
    or a page that cannot be written.
    """
    from fpsc.bench.record import RecordError

    try:
        from fpsc.bench.report import write
    except ImportError as error:
        hint = 'pip install "fpsc[pictures]"'
        raise UserError(f"the charts need matplotlib ({error}): {hint}") from error
    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {output}: expected a name that ends in .html")
    try:
        write(files, output)
    except RecordError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"--output {output}: {error.strerror or error}") from error
    if json:
        told = {"report": str(output), "files": [str(file) for file in files]}
        typer.echo(jsonlib.dumps(told))
    else:
        typer.echo(f"written: {output}")
