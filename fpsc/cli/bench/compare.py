"""`fpsc bench compare`: whether one run is slower than another."""

import json as jsonlib
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from fpsc.cli.errors import NOTHING_FOUND

if TYPE_CHECKING:
    from fpsc.bench.compare import Comparison

UNDECIDED = 3  # nothing is slower as far as can be told, and something cannot be told


def compare(
    before: Annotated[str, typer.Argument(help="A record, or a git ref (REF or REF:PATH).")],
    after: Annotated[str, typer.Argument(help="The same, newer.")],
    file: Annotated[
        str | None, typer.Option(help="For a git ref: the record's path in the repository.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Smaller changes are none.")
    ] = 0.05,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Of the test.")] = 0.01,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare two runs of the same cases on the same machine.

    Exit status: 0 where nothing is slower; 1 where something is, or is not measured any more; 2
    where the runs cannot be compared; 3 where there are too few rounds to tell.
    """
    from fpsc.bench.compare import Verdict, load
    from fpsc.bench.compare import compare as compared

    found = compared(load(before, file), load(after, file), threshold=threshold, alpha=alpha)
    if json:
        changes = [asdict(change) for change in found.changes]
        typer.echo(jsonlib.dumps({**asdict(found), "changes": changes}))
    else:
        _show(found)
    if found.of(Verdict.slower) or found.lost:
        raise typer.Exit(NOTHING_FOUND)
    if found.of(Verdict.unknown):
        raise typer.Exit(UNDECIDED)


def _show(found: "Comparison") -> None:
    from rich.console import Console
    from rich.table import Table

    colours = {"slower": "red", "faster": "green", "cannot tell": "yellow"}
    columns = ("case", "", "against", "before", "after", "change", "p", "")
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for c in found.changes:
        unit = "x" if c.against else "/s"
        table.add_row(
            c.case,
            c.contender,
            c.against,
            f"{c.before:.3g}{unit}",
            f"{c.after:.3g}{unit}",
            f"{c.change - 1:+.1%}",
            f"{c.p:.1g}",
            c.verdict.value,
            style=colours.get(c.verdict.value, ""),
        )
    console = Console()
    console.print(table)
    for names, where in ((found.only_before, "before"), (found.only_after, "after")):
        if names:
            console.print(f"only {where}: {', '.join(names)}", markup=False)
    for text in (*found.lost, *found.warnings):
        console.print(text, style="yellow", markup=False)
