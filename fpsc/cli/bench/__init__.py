"""`fpsc bench`: measure compiled models, and show what was measured. One module a command."""

import typer

from fpsc.cli.bench.report import report
from fpsc.cli.bench.table import table
from fpsc.cli.errors import reports_errors

app = typer.Typer(
    name="bench",
    help="Measure compiled models, and show what was measured.",
    no_args_is_help=True,
)
for command in (report, table):
    app.command()(reports_errors(command))
