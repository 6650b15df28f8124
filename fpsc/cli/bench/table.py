"""`fpsc bench table`: a record as a Markdown table."""

import json as jsonlib
from pathlib import Path
from typing import Annotated

import typer

from fpsc.cli.errors import UserError


def table(
    file: Annotated[Path, typer.Argument(help="A record of `fpsc bench`.")],
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the results of fpsattn as a Markdown table, for a README or an issue.

    Exit status: 0; 2 for a file that is no record.
    """
    from fpsc.bench.markdown import table as markdown
    from fpsc.bench.record import RecordError, Run

    try:
        text = markdown(Run.load(file))
    except RecordError as error:
        raise UserError(str(error)) from error
    typer.echo(jsonlib.dumps({"file": str(file), "markdown": text}) if json else text, nl=json)
