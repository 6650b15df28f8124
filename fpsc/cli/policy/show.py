"""`fpsc policy show`: what a policy means for a model, as tables, as a picture, or as JSON."""

import json as jsonlib
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fpsc.cli.errors import UserError

if TYPE_CHECKING:
    from fpsc.cli.policy.subject import Subject
    from fpsc.policy.accounting import Account, Predicted

Grid = Annotated[str | None, typer.Option(metavar="T,Y,X", help="Token grid.")]
Layers = Annotated[int | None, typer.Option(min=1, max=1000, help="Layers of the model.")]
Heads = Annotated[int | None, typer.Option(min=1, max=1000, help="Heads of a layer.")]
Scheduler = Annotated[str | None, typer.Option(help="A scheduler of diffusers, by its class.")]
Steps = Annotated[int | None, typer.Option(help="Steps of the run.")]
Shift = Annotated[float | None, typer.Option(help="The flow's shift.")]
Component = Annotated[
    str | None, typer.Option(help="A transformer of the pipeline, transformer_2 for example.")
]

Cost = Annotated[
    str | None,
    typer.Option(
        metavar="FILE|roofline",
        help="Also predict times: a fit of `fpsc bench device`, or a bound for the GPU here.",
    ),
]


def show(
    policy: Annotated[
        str, typer.Argument(metavar="POLICY", help="A file, or the name of a built-in policy.")
    ],
    grid: Grid = None,
    layers: Layers = None,
    heads: Heads = None,
    scheduler: Scheduler = None,
    steps: Steps = None,
    shift: Shift = None,
    component: Component = None,
    cost: Cost = None,
    png: Annotated[Path | None, typer.Option(help="Also draw it, into this file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what a policy does: the mode of every step, keep by noise and layer, what a tile sees.

    What is not given is taken from the policy, else from the model that its name stands for
    (Wan2.1 14B where it stands for none). Works without that model. All numbers are counted from
    the lists of tiles; nothing is measured. With --cost, times of the attention are predicted too.
    """
    from fpsc.cli.policy.subject import subject
    from fpsc.policy import PolicyError
    from fpsc.policy.accounting import account

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
    try:
        counted = account(found.policy, found.size, found.levels)
    except PolicyError as error:
        raise UserError(f"{error}; --layers and --heads give the sizes of your model") from error
    times = None if cost is None else _predicted(counted, cost)
    if png is not None:
        _draw(counted, found.levels, png)
    if json:
        typer.echo(jsonlib.dumps(as_json(found, counted, times)))
    else:
        _print(found, counted, times)
        if png is not None:
            typer.echo(f"drawn into {png}")


def _predicted(account: "Account", source: str) -> "Predicted":
    from fpsc.cost import DeviceCost, roofline
    from fpsc.policy.accounting import predicted

    try:
        if source != "roofline":
            return predicted(account, DeviceCost.load(Path(source)))
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                "--cost roofline: torch sees no GPU here; give a file of `fpsc bench device`"
            )
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return predicted(account, roofline(properties, account.size.head_dim))
    except ValueError as error:
        raise UserError(f"--cost {source}: {error}") from error


def as_json(
    found: "Subject", account: "Account", times: "Predicted | None" = None
) -> dict[str, Any]:
    """Plain values only, for `json.dumps`; work in operations of one forward."""
    from fpsc.grid import padded_work, spread

    share, run = account.share(), account.run_share()
    tile = account.plan.layout.tile
    return {
        "policy": found.policy.name,
        "source": found.policy.source,
        "assumed": found.assumed,
        "layers": account.size.layers,
        "heads": account.size.heads,
        "grid": list(account.size.grid),
        "applies": account.applies,
        "tile": {
            "shape": list(tile),
            "grid": list(account.plan.layout.tile_grid),
            "padded_work": padded_work(account.size.grid, tile),
            "spread": spread(tile),
        },
        "phases": [
            {
                "noise": list(account.table.noise_ranges[row]),
                "modes": account.modes_of(row),
                "steps": account.rows_of_steps.count(row),
                "keep": float(account.row_keep()[row]),
                "flops": int(account.row_flops()[row]),
                "share_of_step": None if share is None else float(share[row]),
                "keep_by_layer": account.keep[:, row].mean(axis=1).tolist(),
                "keep_by_head": account.keep[:, row].mean(axis=0).tolist(),
            }
            for row in range(account.rows)
        ],
        "steps": [
            {"noise": level, "phase": row, "keep": float(account.row_keep()[row])}
            for level, row in zip(found.levels, account.rows_of_steps, strict=True)
        ],
        "dense_flops": account.dense_forward,
        "dense_share_of_step": account.dense_share,
        "dense_steps": account.dense_steps(),
        "mean_keep": account.run_keep(),
        "work_of_run": None if run is None else {"attention": run[0], "all": run[1]},
        "predicted": None
        if times is None
        else {
            "device": times.device.device,
            "source": times.device.source,
            "held_out_error": times.device.held_out_error,
            "seconds_of_phases": times.rows.tolist(),
            "dense_seconds": times.dense,
            "modes_to_dense": times.modes,
        },
    }


def _draw(account: "Account", levels: tuple[float, ...], path: Path) -> None:
    try:
        from fpsc.policy.pictures import policy_figure, save
    except ImportError as error:
        raise UserError(
            f'--png needs matplotlib ({error}): pip install "fpsc[pictures]"'
        ) from error
    try:
        save(policy_figure(account, levels), str(path))
    except OSError as error:
        raise UserError(f"--png {path}: {error.strerror or error}") from error


def _print(found: "Subject", account: "Account", times: "Predicted | None") -> None:
    console = Console(highlight=False)
    size, policy = account.size, found.policy
    t, y, x = size.grid
    console.print(
        f"{policy.name} ({policy.source}) on {size.layers} layers of {size.heads} heads, grid "
        f"{t} x {y} x {x} = {size.grid.tokens:,} tokens; what was not given is that of "
        f"{found.assumed}",
        soft_wrap=True,
        markup=False,
    )
    if not account.applies:
        console.print(
            f"shorter than limits.min_tokens ({policy.limits.min_tokens:,}): all stays dense",
            style="yellow",
        )
    _print_tile(console, account)
    console.print(_phases(account, times))
    console.print("work: attention's, dense is 1; share: attention's part of all work in a step")
    if times is not None:
        console.print(
            f"time: predicted of attention on {times.device}; dense in 16 bits is 1, "
            f"{times.dense * 1e3:.3g} ms a forward",
            soft_wrap=True,
            markup=False,
        )
        for name in times.slower:
            console.print(
                f"{name}: predicted to take {times.modes[name]:.2f}x the time of the dense mode",
                style="yellow",
                markup=False,
            )
    _print_steps(console, found, account)
    _print_layers(console, account)
    _print_windows(console, account)


def _print_tile(console: Console, account: "Account") -> None:
    from fpsc.grid import padded_work, spread

    layout = account.plan.layout
    (t, y, x), (a, b, c) = layout.tile, layout.tile_grid
    console.print(
        f"tile {t} x {y} x {x} ({'planned' if account.policy.tile == 'auto' else 'stated'}), "
        f"{a} x {b} x {c} = {layout.tile_grid.tokens} of them: "
        f"{padded_work(layout.grid, layout.tile):.2f}x the work without padding, spread "
        f"{spread(layout.tile):.2f}"
    )


def _phases(account: "Account", times: "Predicted | None") -> Table:
    """One line a stretch of noise; work, time and share are those of its attention."""
    share = account.share()
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ["noise", "modes", "steps", "keep", "work", "share of a step"]
    for title in titles + ["time"] * (times is not None):
        table.add_column(title, justify="left" if title in ("noise", "modes") else "right")
    for row in range(account.rows):
        modes = account.modes_of(row)
        words = ", ".join(m if p == 1 else f"{m} {p:.0%}" for m, p in modes.items())
        work = account.row_flops()[row] / account.dense_forward
        part = "unknown" if share is None else f"{share[row]:.0%}"
        table.add_row(
            str(account.table.noise_ranges[row]),
            words,
            str(account.rows_of_steps.count(row)),
            f"{account.row_keep()[row]:.3f}",
            f"{work:.3f}",
            part,
            *([] if times is None else [f"{times.rows[row] / times.dense:.3f}"]),
        )
    return table


def _print_steps(console: Console, found: "Subject", account: "Account") -> None:
    n = len(found.levels)
    strip = Text()
    names = [" + ".join(account.modes_of(row)) for row in account.rows_of_steps]
    colours = dict(zip(dict.fromkeys(names), _COLOURS * 8, strict=False))
    for name in names:
        strip.append("█", colours[name])
    console.print(f"{account.dense_steps()} of {n} steps dense, mean keep {account.run_keep():.3f}")
    console.print(strip)
    first = 0
    for name, group in groupby(names):
        count = len(list(group))
        last = first + count - 1
        span = f"step {first}" if count == 1 else f"steps {first} to {last}"
        line = Text("█ ", colours[name])
        line.append(
            f"{span}: {name} (noise {found.levels[first]:.3f} to {found.levels[last]:.3f})",
            "default",
        )
        console.print(line)
        first += count
    run = account.run_share()
    if run is not None:
        console.print(
            f"work of the run: attention {run[0]:.2f} of dense, with everything else {run[1]:.2f} "
            f"(attention is {account.dense_share:.0%} of a dense step)"
        )


_COLOURS = ["blue", "green", "yellow", "red", "magenta", "cyan", "white", "bright_black"]


def _print_layers(console: Console, account: "Account") -> None:
    """Keep by layer and noise; layers that do alike share a line, heads are listed where they
    differ."""
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.add_column("layers")
    table.add_column("heads")
    for interval in account.table.noise_ranges:
        table.add_column(str(interval), justify="right")
    rows = [
        (layer, head, tuple(account.keep[layer, :, head].round(3)))
        for layer in range(account.size.layers)
        for head in range(account.size.heads)
    ]
    per_layer: dict[int, dict[tuple[float, ...], list[int]]] = {}
    for layer, head, keep in rows:
        per_layer.setdefault(layer, {}).setdefault(keep, []).append(head)
    for _, group in groupby(per_layer.items(), key=lambda item: sorted(item[1].items())):
        alike = list(group)
        layers = _range([layer for layer, _ in alike])
        for keep, heads in alike[0][1].items():
            named = "all" if len(heads) == account.size.heads else _range(heads)
            table.add_row(layers, named, *(f"{k:.3f}" for k in keep))
            layers = ""
    console.print(Text("keep by layer, head and noise", "bold"))
    console.print(table)


def _range(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> 0..2, 5."""
    parts = []
    for _, group in groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        run = [n for _, n in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}")
    return ", ".join(parts)


def _print_windows(console: Console, account: "Account") -> None:
    """What a tile in the middle sees, one map for each time slab of tiles."""
    from fpsc.policy.patterns import pattern_of, visible

    tiles, tile = account.plan.layout.tile_grid, account.plan.layout.tile
    t, y, x = (n // 2 for n in tiles)
    shown = set()
    for name, mode in account.policy.modes.items():
        pattern = pattern_of(mode)
        if pattern.kind == "dense" or pattern in shown:
            continue
        shown.add(pattern)
        seen = visible(pattern, tiles, tile, t)[y * tiles.x + x].reshape(tiles)
        console.print(
            Text(f"{name}: what the tile in the middle sees, by time slab of tiles", "bold")
        )
        per_line = max(1, console.width // (tiles.x + 2))
        for first in range(0, tiles.t, per_line):
            slabs = range(first, min(first + per_line, tiles.t))
            for row in range(tiles.y):
                line = "  ".join(
                    "".join(
                        "◆" if (s, row, c) == (t, y, x) else "█" if seen[s, row, c] else "·"
                        for c in range(tiles.x)
                    )
                    for s in slabs
                )
                console.print(line, no_wrap=True, overflow="crop")
            console.print()
