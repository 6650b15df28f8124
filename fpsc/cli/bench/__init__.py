"""`fpsc bench`: measure compiled models, and show it. One module a command."""

import typer

from fpsc.cli.bench.compare import compare
from fpsc.cli.bench.device import device
from fpsc.cli.bench.list import list_cases
from fpsc.cli.bench.quick import bench
from fpsc.cli.bench.report import report
from fpsc.cli.bench.run import run
from fpsc.cli.bench.table import table
from fpsc.cli.errors import reports_errors

app = typer.Typer(
    name="bench",
    help="Measure fpsattn beside every other way to run a model.",
    no_args_is_help=True,
)
app.callback(invoke_without_command=True)(reports_errors(bench))
app.command()(reports_errors(run))
app.command(name="list")(reports_errors(list_cases))
app.command()(reports_errors(compare))
app.command()(reports_errors(device))
app.command()(reports_errors(report))
app.command()(reports_errors(table))
