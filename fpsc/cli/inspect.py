"""`fpsc inspect`: every attention of a model, and what the backend would do with it."""

import json as jsonlib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpsc.cli.errors import NOTHING_FOUND, UserError

if TYPE_CHECKING:
    import torch

    from fpsc.cli.capture import Capture
    from fpsc.grid import TokenGrid
    from fpsc.report import Site

DEFAULT_GRID = (21, 30, 52)  # 81 frames of 480 x 832 with Wan's VAE and patches


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder with config.json, a class name of diffusers, or a hub id (owner/name)."
        ),
    ],
    config: Annotated[
        str | None,
        typer.Option(help="With a class name: a JSON file or inline JSON; else its defaults."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="Name or file of the policy to judge by; default: the family's."),
    ] = None,
    grid: Annotated[str | None, typer.Option(help="Token grid T,Y,X.", metavar="T,Y,X")] = None,
    frames: Annotated[int | None, typer.Option(help="Video frames, with height and width.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: what the model was trained on, or 512.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of weights and latents.")] = Dtype.bfloat16,
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input", help="An argument of forward: NAME=SHAPE[:DTYPE] or NAME=NUMBER. Repeatable."
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="One row for each site.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the attentions of MODEL: role, shape, grid, and whether each is replaced, and why.

    The model is built without memory for its weights and runs on shapes alone. Exit status: 0
    where something is replaced, 1 where nothing is, 2 for input that cannot be used.
    """
    from fpsc.cli.capture import capture
    from fpsc.cli.table import Inspection, as_json, show
    from fpsc.models.build import build, find_model
    from fpsc.models.inputs import example_inputs, parse_input

    spec = find_model(model, config)
    torch_dtype = _torch_dtype(dtype)
    built = build(spec, torch_dtype)
    policy = _policy(policy, built, spec.origin)
    tokens = _grid(built, grid, frames, height, width)
    inputs = example_inputs(
        built,
        grid=tokens,
        batch=batch,
        text_tokens=text_tokens,
        dtype=torch_dtype,
        given=dict(parse_input(text) for text in input or ()),
    )
    captured = capture(built, inputs)
    if not captured.graphs:
        raise UserError(
            f"{spec.class_name} did not run on the example inputs ({captured.problem}); "
            "if an argument is to blame, set it with --input NAME=SHAPE[:DTYPE]"
        )
    found = Inspection(
        class_name=spec.class_name,
        origin=spec.origin,
        policy=policy,
        dtype=dtype.value,
        grid=(tokens.t, tokens.y, tokens.x),
        graphs=len(captured.graphs),
        breaks=dict(captured.breaks),
        problem=captured.problem,
        sites=_analyse(captured, policy),
    )
    if json:
        typer.echo(jsonlib.dumps(as_json(found)))
    else:
        show(found, every=every)
    if not found.replaced:
        raise typer.Exit(NOTHING_FOUND)


def _torch_dtype(dtype: Dtype) -> Any:
    import torch

    return getattr(torch, dtype.value)


def _grid(
    model: "torch.nn.Module",
    grid: str | None,
    frames: int | None,
    height: int | None,
    width: int | None,
) -> "TokenGrid":
    """The token grid that the options ask for."""
    from fpsc.grid import TokenGrid
    from fpsc.models.inputs import grid_of_video

    sizes = {"--frames": frames, "--height": height, "--width": width}
    missing = [name for name, value in sizes.items() if value is None]
    if grid is not None:
        if len(missing) < len(sizes):
            raise UserError("--grid and --frames, --height, --width exclude each other")
        parts = grid.split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
            raise UserError(f"--grid {grid}: expected three positive integers T,Y,X, as 21,30,52")
        return TokenGrid(*map(int, parts))
    if len(missing) == len(sizes):
        return TokenGrid(*DEFAULT_GRID)
    if missing:
        raise UserError(f"{', '.join(missing)} missing: a clip has frames, height and width")
    assert frames is not None and height is not None and width is not None
    config: Any = model.config
    return grid_of_video(
        type(model).__name__, dict(config), frames=frames, height=height, width=width
    )


def _analyse(captured: "Capture", policy: str) -> "list[tuple[int, Site]]":
    """(graph, site) for every attention, in the order of the graphs."""
    from fpsc.backend import analyse_graph

    return [
        (number, site)
        for number, gm in enumerate(captured.graphs)
        for site in analyse_graph(gm, {"policy": policy}).sites
    ]


def _policy(name: str | None, model: "torch.nn.Module", origin: str) -> str:
    """What the backend would take: the policy that is named, else the one beside the weights, else
    the one for the model's family; `origin` is the file of the model's configuration."""
    from fpsc.families import family_of
    from fpsc.policy import PolicyError, find
    from fpsc.policy.load import BESIDE

    saved = Path(origin).parent / BESIDE
    if name is None and saved.is_file() and Path(origin).is_file():
        name = str(saved)
    if name is None:
        family = family_of(model)
        name = family.policy if family else "generic"
    try:
        find(name)
    except PolicyError as error:
        raise UserError(str(error)) from error
    return name
