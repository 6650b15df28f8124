"""`fpsc policy convert`: settings of other methods as a policy."""

import json as jsonlib
import shutil
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from fpsc.cli.errors import UserError, reports_errors
from fpsc.cli.policy.output import target_of, write
from fpsc.cli.policy.subject import parsed_grid

if TYPE_CHECKING:
    from fpsc.policy import Policy
    from fpsc.policy.convert import Converted

MAX_BYTES = 64 << 20  # a strategy of 1000 steps, 60 layers and 24 heads

app = typer.Typer(
    name="convert", help="Write settings of other methods as a policy.", no_args_is_help=True
)


class Dtype(StrEnum):
    bf16 = "bf16"
    fp8 = "fp8"


Scheduler = Annotated[
    str | None, typer.Option(help="Class of diffusers that the steps are counted with.")
]
Shift = Annotated[float | None, typer.Option(help="The flow's shift, as the scheduler has it.")]
Output = Annotated[str, typer.Option("--output", "-o", help='The file; "-" prints it.')]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files.")]
Precision = Annotated[Dtype, typer.Option(help="Of the sparse modes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def sta(
    file: Annotated[Path, typer.Argument(help='JSON with windows by "step_layer_head".')],
    output: Output,
    scheduler: Scheduler = None,
    shift: Shift = None,
    grid: Annotated[
        str | None, typer.Option(metavar="T,Y,X", help="Token grid that it was searched on.")
    ] = None,
    dtype: Precision = Dtype.bf16,
    force: Force = False,
    json: Json = False,
) -> None:
    """A mask strategy of Sliding Tile Attention (FastVideo), by step, layer and head.

    Where single heads differ in more than a few rules, a table is written beside the policy.
    """
    from fpsc.policy import Policy
    from fpsc.policy.convert import from_sta

    if scheduler is None:
        raise UserError("--scheduler is missing: steps become noise by a scheduler of diffusers")
    target = target_of(output, force)
    stem = target.stem if target else file.stem
    try:
        converted = from_sta(
            _read(file),
            scheduler=scheduler,
            shift=shift,
            name=stem,
            table=f"{stem}.safetensors",
            grid=parsed_grid(grid) if grid else None,
            dtype=dtype.value,
        )
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error
    if converted.cells is None:
        _done(Policy.load(converted.text), target, None, json)
    elif target is None:
        raise UserError("it needs a table beside the policy: name a file with --output")
    else:
        table = target.with_suffix(".safetensors")
        if table.exists() and not force:
            raise UserError(f"{table} is there already; --force replaces it")
        _done(_with_table(converted, target, table), target, table, json)


def _with_table(converted: "Converted", target: Path, table: Path) -> "Policy":
    """Write a policy and its table, after both were read once: they fit, or nothing is written."""
    from fpsc.policy import Policy, tables

    assert converted.edges is not None and converted.modes is not None
    assert converted.cells is not None
    with TemporaryDirectory() as folder:
        here, there = Path(folder) / table.name, Path(folder) / target.name
        tables.write(here, edges=converted.edges, modes=converted.modes, cells=converted.cells)
        there.write_text(converted.text, encoding="utf-8")
        policy = Policy.load(there)
        try:
            shutil.copyfile(here, table)
            shutil.copyfile(there, target)
        except OSError as error:
            raise UserError(f"{target} cannot be written: {error.strerror}") from error
    return policy


def svg(
    output: Output,
    layers: Annotated[int, typer.Option(min=1, help="Of the model.")],
    sparsity: Annotated[float, typer.Option(help="Share that is computed, as SVG calls it.")],
    first_times_fp: Annotated[float, typer.Option(help="Share of the run that is dense.")] = 0.0,
    first_layers_fp: Annotated[float, typer.Option(help="Share of layers that are dense.")] = 0.0,
    scheduler: Scheduler = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the run, with --scheduler.")] = None,
    shift: Shift = None,
    dtype: Precision = Dtype.bf16,
    force: Force = False,
    json: Json = False,
) -> None:
    """Settings of Sparse VideoGen: its first steps and layers dense, the rest sparse.

    With --scheduler and --steps, --first-times-fp is a share of the steps, as SVG takes it now;
    without them it is a share of noise, as in its older versions.
    """
    from fpsc.policy import Policy
    from fpsc.policy.convert import from_svg, sampling_of

    if (scheduler is None) != (steps is None):
        raise UserError("--scheduler and --steps go together: they are the run")
    target = target_of(output, force)
    try:
        text = from_svg(
            first_times=first_times_fp,
            first_layers=first_layers_fp,
            keep=sparsity,
            layers=layers,
            name=target.stem if target else "svg",
            sampling=sampling_of(scheduler, steps, shift) if scheduler and steps else None,
            dtype=dtype.value,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    _done(Policy.load(text), target, None, json)


def _read(file: Path) -> str:
    try:
        with file.open("rb") as f:
            data = f.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{file}: larger than {MAX_BYTES >> 20} MiB")
        return data.decode("utf-8")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8, byte {error.start}") from error


def _done(policy: "Policy", target: Path | None, table: Path | None, json: bool) -> None:
    if json and target is None:
        raise UserError("--json and --output - both want standard output; choose one")
    if table is None:
        write(policy, target)
    if json:
        found = {
            "file": str(target),
            "table": str(table) if table else None,
            "modes": list(policy.modes),
        }
        typer.echo(jsonlib.dumps(found))
    elif target is not None:
        beside = f", and {table} beside it" if table else ""
        typer.echo(f"{target} written{beside}: modes {', '.join(policy.modes)}")


for command in (sta, svg):
    app.command()(reports_errors(command))
