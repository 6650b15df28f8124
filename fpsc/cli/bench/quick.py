"""`fpsc bench --quick`: every kind of answer within minutes."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from fpsc.cli.bench.options import machine
from fpsc.cli.bench.run import finish, measured


def bench(
    context: typer.Context,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small cases of every kind: five minutes on two cores.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The record.")] = Path(
        "fpsc-bench-quick.json"
    ),
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the record.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the record.")] = False,
) -> None:
    """Measure fpsattn beside every other way to run a model."""
    if context.invoked_subcommand is not None:
        if quick:
            raise typer.BadParameter("--quick takes no command", context)
        return
    if not quick:
        typer.echo(context.get_help())
        raise typer.Exit
    from fpsc.bench.cases import quick as cases
    from fpsc.bench.measure import Effort
    from fpsc.bench.run import Plan

    plan = Plan(
        specs=cases(),
        machine=machine(device=device, dtype=None, threads=threads),
        effort=Effort(rounds=7, seconds=20.0, least=5),
        output=output,
        command=" ".join(["fpsc", *sys.argv[1:]]),
        fresh=fresh,
    )
    finish(measured(plan), output, json)
