"""`fpsc bench list`: the registry of cases."""

import json as jsonlib
from typing import Annotated

import typer

from fpsc.errors import UserError


def list_cases(
    level: Annotated[str | None, typer.Argument(help="The beginning of a name.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the cases that `fpsc bench run` knows, and the models that it knows by name."""
    import torch

    from fpsc.bench.cases import chosen, registry
    from fpsc.models.known import KNOWN

    known = registry(cuda=torch.cuda.is_available())
    specs = list(known.values()) if level is None else chosen([level], known)
    if json:
        cases = [{"name": s.name, "level": str(s.level), "model": s.model} for s in specs]
        models = {
            name: {
                "title": model.title,
                "class": model.spec.class_name,
                "clips": {size: list(clip) for size, clip in model.clips.items()},
            }
            for name, model in KNOWN.items()
        }
        typer.echo(jsonlib.dumps({"cases": cases, "models": models}))
        return
    if not specs:
        raise UserError("the registry is empty")
    from rich.console import Console
    from rich.table import Table

    groups: dict[str, list[str]] = {}
    for spec in specs:
        group, _, rest = spec.name.partition("/")
        groups.setdefault(group, []).append(rest)
    table = Table("", "cases", box=None, pad_edge=False, header_style="bold")
    for group, names in groups.items():
        table.add_row(group, "  ".join(f"{group}/{name}" for name in names))
    console = Console()
    console.print(table)
    console.print("\nThe beginning of a name stands for all of them: fpsc bench run transformer")
