"""`fpsc encode`: clips and captions to latents and embeddings on disk, for training."""

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpsc.cli.errors import NOTHING_FOUND, UserError
from fpsc.cli.inspect import Dtype

if TYPE_CHECKING:
    from fpsc.train.data.encode import Encoder, Job, Result
    from fpsc.train.data.index import Index

DEMO = "demo"


def encode(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A folder of clips with captions in .txt beside them, a list of clips in .jsonl "
            "or .csv, or demo: the synthetic clips.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the shards.")],
    model: Annotated[
        str | None,
        typer.Option(help="A diffusers text-to-video pipeline: a folder, or a hub id once fetched."),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(
            help="Frames, height and width, as 81x480x832. Give it several times, and each clip "
            "gets the one that is nearest in its proportions."
        ),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(min=0.01, max=1000, help="Take so many frames a second; default: all."),
    ] = None,
    clips: Annotated[
        int | None, typer.Option(min=1, max=2**31 - 1, help="demo: how many; default 64.")
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(min=0, max=0.9, help="The fraction of clips that is kept for validation."),
    ] = 0.0,
    per_shard: Annotated[int, typer.Option(min=1, max=65536, help="Clips in a file.")] = 64,
    guidance: Annotated[
        float | None,
        typer.Option(help="What a model with distilled guidance is told; default: its pipeline's."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of text; default: the pipeline's.")
    ] = None,
    tiling: Annotated[
        bool, typer.Option("--tiling", help="The VAE works in tiles: less memory, other seams.")
    ] = False,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave out clips that cannot be read.")
    ] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of text encoders and of what is stored; default bfloat16 on a GPU, else float32. "
            "The VAE computes in float32."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Default cuda where there is one, else cpu.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Encode clips with a model's VAE and text encoders, once, for `fpsc train`.

    Writes safetensors shards and index.json into OUT. Run it again to go on after a stop, or after
    a shard was lost. Exit status: 0; 1 where clips were left out; 2 for input that cannot be used.
    """
    from fpsc.cli.version import installed
    from fpsc.train.data.encode import DemoEncoder, encode
    from fpsc.train.data.write import writing

    jobs: list[Job]
    encoder: Encoder
    if source == DEMO:
        given = {
            "--model": model,
            "--size": size,
            "--fps": fps,
            "--guidance": guidance,
            "--max-length": max_length,
            "--tiling": tiling or None,
            "--dtype": dtype,
            "--device": device,
        }
        if named := [name for name, value in given.items() if value is not None]:
            raise UserError(f"{named[0]} is for clips of files: demo has its own codec and size")
        demo = DemoEncoder()
        encoder, jobs = demo, list(demo.jobs(clips or 64, held_out))
    else:
        if clips is not None:
            raise UserError("--clips is for demo: all clips of a folder or a list are encoded")
        encoder, jobs = _with_pipeline(
            source, model, size, fps, held_out, guidance, max_length, tiling, dtype, device
        )
    encoded = {**encoder.encoded, "versions": installed()}
    try:
        with writing(out, encoded, encoder.common(), size=per_shard) as writer, _progress() as bar:
            task = bar.add_task("encoding", total=len(jobs))
            result = encode(
                jobs, writer, skip_broken=skip_broken, on_clip=lambda _: bar.advance(task)
            )
    except OSError as error:
        raise UserError(
            f"{error}. The shards that are written stay; the same command goes on from there, or "
            "choose another folder as OUT"
        ) from error
    index = writer.index
    if json:
        typer.echo(jsonlib.dumps(_told(out, result, index)))
    else:
        _show(out, result, index)
    if result.left_out:
        raise typer.Exit(NOTHING_FOUND)


def _with_pipeline(
    source: str,
    model: str | None,
    size: list[str] | None,
    fps: float | None,
    held_out: float,
    guidance: float | None,
    max_length: int | None,
    tiling: bool,
    dtype: Dtype | None,
    device: str | None,
) -> "tuple[Encoder, list[Job]]":
    import torch

    from fpsc.models.build import find_model
    from fpsc.models.pipelines import load_pipeline
    from fpsc.train.data.clips import Size, listed
    from fpsc.train.data.encode import PipelineEncoder

    if model is None or not size:
        missing = "--model" if model is None else "--size"
        raise UserError(
            f"expected {missing}, found none: clips of files need the pipeline that encodes them "
            "and a size, as --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --size 81x480x832"
        )
    sizes = [Size.parse(text) for text in size]
    files = listed(Path(source).expanduser())  # before anything that takes long
    on = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, (dtype or (Dtype.float32 if on == "cpu" else Dtype.bfloat16)).value)
    pipe = load_pipeline(
        model, {"vae": torch.float32, "default": kind}, on, without=("transformer",)
    )
    if tiling:
        if not hasattr(pipe.vae, "enable_tiling"):
            raise UserError(f"--tiling: {type(pipe.vae).__name__} has no tiling")
        pipe.vae.enable_tiling()
    encoder = PipelineEncoder(
        pipe,
        find_model(model),
        model=model,
        sizes=sizes,
        fps=fps,
        dtype=kind,
        device=on,
        guidance=guidance,
        max_length=max_length,
    )
    return encoder, list(encoder.jobs(files, held_out))


def _progress() -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _told(out: Path, result: "Result", index: "Index") -> dict[str, Any]:
    return {
        "out": str(out),
        "encoded": result.encoded,
        "done_before": result.done,
        "left_out": result.left_out,
        "clips": sum(map(len, index.shards)),
        "held_out": sum(len(shard) for shard in index.shards if shard.held_out),
        "shards": len(index.shards),
        "bytes": sum(shard.bytes for shard in index.shards),
        "shapes": sorted(
            {tuple(shard.tensors["latents"].shape) for shard in index.shards if len(shard)}
        ),
        "model": index.encoded["model"],
    }


def _show(out: Path, result: "Result", index: "Index") -> None:
    from rich.console import Console

    told = _told(out, result, index)
    console = Console(highlight=False)
    before = f", {result.done} were done before" if result.done else ""
    console.print(f"{result.encoded} clips encoded{before}", markup=False)
    console.print(
        f"{out}: {told['clips']} clips ({told['held_out']} held out) in {told['shards']} shards, "
        f"{told['bytes'] / 1e6:.1f} MB",
        markup=False,
        soft_wrap=True,
    )
    for shape in told["shapes"]:
        console.print(f"latents {list(shape)} (channels, frames, height, width)", markup=False)
    for name, reason in result.left_out.items():
        console.print(f"left out {name}: {reason}", style="yellow", markup=False, soft_wrap=True)
