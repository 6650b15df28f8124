"""`fpsc policy explain`: which line of a policy decides what one head does in one step."""

import json as jsonlib
from typing import Annotated, Any

import typer
from rich.console import Console

from fpsc.cli.errors import UserError
from fpsc.cli.policy.show import Component, Grid, Heads, Layers, Scheduler, Shift, Steps


def explain(
    policy: Annotated[
        str, typer.Argument(metavar="POLICY", help="A file, or the name of a built-in policy.")
    ],
    step: Annotated[
        int | None, typer.Option(help="Step of the run, counted from 0; or give --noise.")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(help="Level from 1 (pure noise) to 0 (clean).")
    ] = None,
    layer: Annotated[int, typer.Option(help="Layer, counted from 0.")] = 0,
    head: Annotated[int, typer.Option(help="Head, counted from 0.")] = 0,
    grid: Grid = None,
    layers: Layers = None,
    heads: Heads = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    shift: Shift = None,
    component: Component = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Name the line that decides what a head does in a step, and the lines that it overrules."""
    from fpsc.cli.policy.subject import subject
    from fpsc.grid import tile_grid
    from fpsc.policy import PolicyError, resolve
    from fpsc.policy.patterns import fraction, pattern_of

    if (step is None) == (noise is None):
        raise UserError("give --step or --noise, one of both")
    found = subject(
        policy,
        component=component,
        grid=grid,
        layers=layers,
        heads=heads,
        scheduler=scheduler,
        steps=steps,
        shift=shift,
    )
    if step is not None:
        if not 0 <= step < len(found.levels):
            raise UserError(f"--step {step}: the run has {len(found.levels)} steps, from 0")
        noise = found.levels[step]
    assert noise is not None
    size = found.size
    try:
        table = resolve(found.policy, layers=size.layers, heads=size.heads, fp8=True)
        lines = table.lines(table.row_of(noise), layer, head)
    except PolicyError as error:
        raise UserError(f"{error}; --layers and --heads give the sizes of your model") from error
    except (IndexError, ValueError) as error:
        raise UserError(str(error)) from error
    *overruled, won = lines
    mode = found.policy.modes[won.mode]
    short = size.grid.tokens < found.policy.limits.min_tokens
    keep = fraction(pattern_of(mode), tile_grid(size.grid, found.policy.tile_for(size.grid)))
    answer: dict[str, Any] = {
        "step": step,
        "steps": None if step is None else len(found.levels),
        "noise": noise,
        "range": list(won.noise),
        "layer": layer,
        "head": head,
        "mode": won.mode,
        "pattern": pattern_of(mode).kind,
        "keep": keep,
        "dtype": mode.dtype,
        "line": won.rule,
        "overruled": [{"mode": cell.mode, "line": cell.rule} for cell in overruled],
        "applies": not short,
    }
    if json:
        typer.echo(jsonlib.dumps(answer))
        return
    console = Console(highlight=False, soft_wrap=True)
    place = f"noise {noise:.5g}"
    if step is not None:
        place = f"step {step} of {len(found.levels)} ({place})"
    what = f"{won.mode} ({pattern_of(mode).kind}, keep {keep:.3f}, {mode.dtype})"
    console.print(f"{place}, layer {layer}, head {head}: {what}", markup=False)
    console.print(f"  decided by {won.rule}, for noise {won.noise}", markup=False)
    for cell in reversed(overruled):
        console.print(f"  overrules {cell.rule}: {cell.mode}", markup=False)
    if short:
        console.print(
            f"  but this video is shorter than limits.min_tokens "
            f"({found.policy.limits.min_tokens:,}) and stays dense"
        )
