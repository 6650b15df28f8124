"""`fpsc policy diff`: what another policy would change."""

import json as jsonlib
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fpsc.cli.errors import NOTHING_FOUND, UserError
from fpsc.cli.policy.subject import parsed_grid


def diff(
    a: Annotated[str, typer.Argument(help="A file, or the name of a built-in policy.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    layers: Annotated[
        int | None, typer.Option(min=1, help="Of a model, with --heads: compare cell by cell.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1)] = None,
    grid: Annotated[
        str | None, typer.Option(metavar="T,Y,X", help="Token grid: compare keep on it, too.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare policies A and B in what they do, whatever their names and comments.

    Exit status: 0 where they do the same, 1 where they differ, 2 for input that cannot be used.
    """
    from fpsc.policy import PolicyError, find
    from fpsc.policy.diff import cell_changes, changes, keep_changes

    if (layers is None) != (heads is None):
        raise UserError("--layers and --heads go together: they are the size of a model")
    sizes = parsed_grid(grid) if grid else None
    try:
        before, after = find(a), find(b)
        lines = changes(before, after)
        cells, keeps = [], []
        if layers is not None and heads is not None:
            cells = cell_changes(before, after, layers, heads)
        if sizes is not None:
            keeps = keep_changes(before, after, layers or 1, heads or 1, sizes)
    except PolicyError as error:
        raise UserError(str(error)) from error
    if json:
        found = {
            "same": not lines,
            "changes": [vars(change) for change in lines],
            "cells": [{**vars(c), "noise": str(c.noise)} for c in cells],
            "keep": [{**vars(k), "noise": str(k.noise)} for k in keeps],
        }
        typer.echo(jsonlib.dumps(found))
    else:
        _show(a, b, [(c.key, c.before or "", c.after or "") for c in lines], "value")
        places = (f"noise {c.noise}, layers {c.layers}, heads {c.heads}: {c.cells}" for c in cells)
        _show(a, b, [(p, c.before, c.after) for p, c in zip(places, cells, strict=True)], "cells")
        _show(a, b, [(f"{k.noise}", f"{k.before:.3f}", f"{k.after:.3f}") for k in keeps], "keep at")
        if not lines:
            Console().print("the policies do the same")
    if lines:
        raise typer.Exit(NOTHING_FOUND)


def _show(a: str, b: str, rows: list[tuple[str, str, str]], title: str) -> None:
    if not rows:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, style in ((title, None), (a, "red"), (b, "green")):
        table.add_column(name, style=style, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
