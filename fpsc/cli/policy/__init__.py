"""`fpsc policy`: look at policy files, compare, write and convert them. One module a command."""

import typer

from fpsc.cli.errors import reports_errors
from fpsc.cli.policy.check import check
from fpsc.cli.policy.convert import app as convert
from fpsc.cli.policy.diff import diff
from fpsc.cli.policy.explain import explain
from fpsc.cli.policy.init import init
from fpsc.cli.policy.schema import schema
from fpsc.cli.policy.show import show

app = typer.Typer(
    name="policy",
    help="Check, show, explain, compare, write and convert policy files.",
    no_args_is_help=True,
)
for command in (check, show, explain, diff, init, schema):
    app.command()(reports_errors(command))
app.add_typer(convert)
