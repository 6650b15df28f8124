"""`fpsc train`: joint fine-tuning, from a configuration."""

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpsc.cli.errors import UserError

if TYPE_CHECKING:
    from fpsc.train.loop import Result

FAILED = 1
STOPPED = 130  # what a shell reports after Ctrl+C


def train(
    config: Annotated[
        str | None, typer.Argument(help='A configuration, or "demo", which comes with fpsc.')
    ] = None,
    change: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A value in place of the file's."),
    ] = None,
    init: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a commented configuration, and stop.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Read the configuration, and stop.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of configurations, and stop.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train a model jointly with sparse FP8 attention, as a configuration says.

    A run that was stopped goes on from its last checkpoint: start the same command again. Several
    processes: accelerate launch -m fpsc.train CONFIG. Exit status: 0; 1 where the loss is no
    number; 2 for input that cannot be used, or a full disk; 130 after Ctrl+C.
    """
    from fpsc.train.config import dumps_schema, load

    if schema:
        typer.echo(dumps_schema(), nl=False)
        return
    if init is not None:
        _init(init, json)
        return
    if config is None:
        raise UserError(
            'CONFIG is missing: a file, or "demo"; --init FILE writes one to start from'
        )
    loaded = load(config, dict(_change(text) for text in change or []))
    if check:
        found = {"file": loaded.document.file, "valid": True, "config": loaded.values()}
        typer.echo(jsonlib.dumps(found) if json else f"{loaded.document.file}: valid")
        return
    result = _run(loaded, json)
    if result is not None:
        _show(result, json)


def _run(loaded: Any, json: bool) -> "Result | None":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    try:
        from fpsc.train.failure import TrainingFailed
        from fpsc.train.loop import train as run
    except ImportError as error:
        if error.name not in ("accelerate", "peft", "tensorboard"):
            raise
        raise UserError(f'{error.name} is not installed: pip install "fpsc[train]"') from None
    columns = (TextColumn("{task.description:14}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, *times, console=console, disable=not _main()) as progress:
        task = progress.add_task("loading", total=loaded.spec.optimiser.steps)

        def on_step(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        try:
            return run(loaded, on_step=on_step)
        except TrainingFailed as error:
            message, status = str(error), FAILED
        except KeyboardInterrupt:
            message = (
                f"stopped; the same command goes on from the last checkpoint in {loaded.output}"
            )
            status = STOPPED
    if json:
        typer.echo(jsonlib.dumps({"error": message}))
    else:
        typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(status)


def _main() -> bool:
    """Whether this is the first of the processes, as the launchers number them."""
    import os

    return os.environ.get("RANK", "0") == "0"


def _change(text: str) -> tuple[str, Any]:
    """A key and its value, which is YAML."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UserError(f"--set {text}: expected KEY=VALUE, for example optimiser.steps=100")
    try:
        return key, YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        raise UserError(f"--set {text}: {value!r} is not YAML") from None


def _init(target: Path, json: bool) -> None:
    from fpsc.files import replacing
    from fpsc.train.config import recipe

    if target.exists():
        raise UserError(f"{target} is there already; choose another name")
    try:
        with replacing(target) as beside:
            beside.write_text(recipe("start"), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
    typer.echo(jsonlib.dumps({"file": str(target)}) if json else f"{target} written; edit it")


def _show(result: "Result", json: bool) -> None:
    if json:
        typer.echo(jsonlib.dumps({**result.values, "weights": str(result.weights)}))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    title = f"{result.values['steps']} steps, {result.values['seconds'] / 60:.1f} minutes"
    table = Table("validation loss", "dense", "sparse", "gap", title=title, title_justify="left")
    for name in ("before", "after"):
        found = result.values[name]
        table.add_row(
            name,
            f"{found['dense_mean']:.5f}",
            f"{found['sparse_mean']:.5f}",
            f"{found['gap']:+.2%}",
        )
    console.print(table)
    for path in (result.weights, result.file):
        console.print(str(path), markup=False, highlight=False)
