"""The command `fpsc demo`."""

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fpsc.demo.run import Result

NOTHING_REPLACED = 1


def demo(
    prompt: Annotated[
        str | None, typer.Option(help="A sentence of the demo's small language.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the noise.")] = 0,
    steps: Annotated[int, typer.Option(min=2, max=200, help="Sampling steps.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("fpsc-demo"),
    tuned: Annotated[
        Path | None,
        typer.Option(help="Weights that `fpsc train` wrote, in place of those that ship."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Generate a clip from the same noise, dense and with backend="fpsattn".

    The policy is that of weights that were tuned jointly with it: a second clip shows what it makes
    of the dense weights, a third what it makes of the tuned ones. Writes demo.gif, demo.png and
    demo.json into the folder. Exit status: 0; 1 where no attention was replaced; 2 for input that
    cannot be used.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fpsc.cli.errors import UserError
    from fpsc.demo.clips import EXAMPLE, PromptError, parse_prompt
    from fpsc.demo.model import tuned_weights
    from fpsc.demo.run import run

    try:
        scene = parse_prompt(prompt or EXAMPLE)
    except PromptError as error:
        raise UserError(str(error)) from None
    columns = (TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn())
    tuned = tuned or tuned_weights()
    sides = ("dense", "fpsattn", *(("tuned",) if tuned else ()))
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        tasks = {name: progress.add_task(name, total=steps) for name in sides}

        def on_step(label: str, done: int, total: int) -> None:
            task = tasks[label.split(":")[0]]
            progress.update(task, description=label, completed=done, total=total)

        try:
            result = run(scene, seed, steps, out, on_step, tuned=tuned)
        except (FileNotFoundError, ValueError) as error:
            raise UserError(str(error)) from None
        except OSError as error:
            raise UserError(f"{error}. Choose a folder that can be written with --out") from None
    if json:
        typer.echo(jsonlib.dumps(result.as_dict(), indent=1))
    else:
        _show(result)
    if not result.replaced:
        typer.secho(
            "no attention was replaced: all clips are dense; the report above says why",
            fg=typer.colors.RED,
            err=True,
        )
        raise typer.Exit(NOTHING_REPLACED)


def _show(result: "Result") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{result.scene.prompt}[/bold]  (seed {result.seed})\n")
    for report in result.reports:
        console.print(str(report), markup=False, highlight=False)

    table = Table(
        *("", "compile", f"{result.steps} steps", "PSNR", "SSIM"),
        title="seconds, and how near to the dense clip",
        title_justify="left",
    )
    for name, side in result.sides.items():
        seconds = f"{side.compile_seconds:.1f}", f"{side.sample_seconds:.1f}"
        decibel, similarity = result.likeness(side)
        likeness = ("", "") if name == "dense" else (f"{decibel:.1f} dB", f"{similarity:.3f}")
        table.add_row(name, *seconds, *likeness)
    console.print(table)
    if result.tuned is not None:
        console.print(
            "tuned: other weights draw another clip of the same sentence, dense ones too. What the "
            "tuning is worth over many clips: docs/joint.md",
            style="dim",
        )
    for path in result.files:
        console.print(str(path), markup=False, highlight=False)
