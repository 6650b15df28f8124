"""`fpsc bench device`: fit the cost of this device, for `fpsc policy show --cost`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fpsc.cli.bench.options import Dtype, grid_of, machine
from fpsc.cli.errors import NOTHING_FOUND

if TYPE_CHECKING:
    from fpsc.cost import DeviceCost

SIZES = {"cuda": ((21, 45, 80), 40), "cpu": ((5, 20, 36), 4)}
"""Grid and heads where none are given: Wan2.1-14B at 720p, and what a CPU does in a minute."""


def device(
    grid: Annotated[
        str | None, typer.Option(metavar="T,Y,X", help="Token grid of the attention.")
    ] = None,
    heads: Annotated[int | None, typer.Option(min=1, max=1000, help="Of the attention.")] = None,
    head_dim: Annotated[int, typer.Option(min=16, max=256, help="Of the attention.")] = 128,
    on: Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: bfloat16 on a GPU, else float32.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Of timing, beside compilation.")] = 60.0,
    output: Annotated[Path, typer.Option("--output", "-o", help="The fit.")] = Path(
        "fpsc-device.json"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print the fit.")] = False,
) -> None:
    """Time the attention at several values of keep, and fit what an item and a tile cost here.

    Two values of keep are held out and predicted. The file is written in any case, with every
    time; one whose prediction is wrong by too much says so and is not used.

    Exit status: 0; 1 where the fit is refused; 2 for input that cannot be used.
    """
    from fpsc.bench.measure import Effort
    from fpsc.bench.op import Shape
    from fpsc.cli.bench.output import progress
    from fpsc.kernels.select import fp8_support, select
    from fpsc.tune.timing import device_cost

    found = machine(device=on, dtype=dtype, threads=threads)
    planned, planned_heads = SIZES[found.device.type]
    shape = Shape(grid_of(grid) if grid else planned, heads or planned_heads, head_dim)
    fp8 = fp8_support(found.device)[0]
    choice = select(found.device, found.dtype, head_dim, fp8=fp8)
    with progress(1) as (tell, _):
        fitted = device_cost(
            shape,
            device=found.device,
            dtype=found.dtype,
            fp8=fp8,
            effort=Effort(rounds=9, seconds=seconds),
            tell=tell,
        )
    fitted.save(output)
    if json:
        typer.echo(fitted.model_dump_json())
    else:
        _print(fitted, choice.reason)
        typer.echo(str(output))
    if fitted.refusal:
        typer.secho(f"not to be used: {fitted.refusal}", fg=typer.colors.RED, err=True)
        raise typer.Exit(NOTHING_FOUND)


def _print(fitted: "DeviceCost", kernel: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"{fitted}; {kernel}", markup=False)
    console.print(
        f"{fitted.workers} workers; a call {fitted.overhead * 1e6:.1f} us; bytes "
        f"{fitted.bandwidth / 1e9:.0f} GB/s"
    )
    for dtype, kind in fitted.kinds.items():
        console.print(
            f"{dtype}: a query tile {kind.item * 1e6:.2f} us, a visited tile "
            f"{kind.tile * 1e6:.3f} us"
        )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("measured", "ms", "predicted", "error", ""):
        table.add_column(title, justify="left" if title in ("measured", "") else "right")
    for point in fitted.points:
        table.add_row(
            point.name,
            f"{point.seconds * 1e3:.3f}",
            f"{point.predicted * 1e3:.3f}",
            f"{point.error:.1%}",
            "held out" if point.held_out else "",
        )
    console.print(table)
