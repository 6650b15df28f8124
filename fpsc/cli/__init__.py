"""The command `fpsc`. One file a command; torch is imported inside a command, never up here."""

from typing import Annotated

import typer

from fpsc.cli.bench import app as bench
from fpsc.cli.compare import compare
from fpsc.cli.encode import encode
from fpsc.cli.errors import reports_errors
from fpsc.cli.inspect import inspect
from fpsc.cli.policy import app as policy
from fpsc.cli.train import train
from fpsc.cli.tune import tune
from fpsc.cli.version import installed, version
from fpsc.demo.command import demo

app = typer.Typer(
    name="fpsc",
    help="Sparse FP8 attention for video diffusion transformers, as a torch.compile backend.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (compare, demo, encode, inspect, train, tune, version):
    app.command()(reports_errors(command))
app.add_typer(bench)
app.add_typer(policy)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fpsc {installed()['fpsc'] or '(not installed)'}")
        raise typer.Exit


@app.callback()
def main(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass
