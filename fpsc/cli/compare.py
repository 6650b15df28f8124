"""`fpsc compare`: an accelerated clip beside the dense one, and in numbers."""

import json as jsonlib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpsc.cli.errors import NOTHING_FOUND, UserError
from fpsc.cli.inspect import Dtype

if TYPE_CHECKING:
    from rich.progress import Progress

    from fpsc.quality.clips import Clip
    from fpsc.quality.compare import Comparison
    from fpsc.quality.generate import Pair


class Network(StrEnum):
    alex = "alex"
    vgg = "vgg"
    squeeze = "squeeze"


def compare(
    first: Annotated[
        str,
        typer.Argument(
            metavar="A", help="The dense clip; or a diffusers pipeline, which makes both."
        ),
    ],
    second: Annotated[
        Path | None, typer.Argument(metavar="[B]", help="The accelerated clip of the same noise.")
    ] = None,
    label: Annotated[list[str] | None, typer.Option(help="Of A, then of B. Give it twice.")] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.1, max=1000, help="Default: the clips', else 16.")
    ] = None,
    lpips: Annotated[Network, typer.Option(help="The network of LPIPS.")] = Network.alex,
    out: Annotated[Path, typer.Option(help="Folder for page, video and JSON.")] = Path(
        "fpsc-compare"
    ),
    min_psnr: Annotated[
        float | None, typer.Option(help="dB: exit status 1 where the clips are less alike.")
    ] = None,
    min_ssim: Annotated[float | None, typer.Option(min=-1, max=1, help="Likewise.")] = None,
    policy: Annotated[
        str | None, typer.Option(help="Pipeline: name or file; default: the family's.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Pipeline: what to draw.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Pipeline.")] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(
            help="Pipeline: a safetensors file; each tensor is the argument of its name, as "
            "prompt_embeds."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Pipeline: of the noise.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Pipeline: sampling steps.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Pipeline.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pipeline: pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pipeline: pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Pipeline: guidance scale.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Pipeline: default bfloat16 on a GPU, else float32.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Pipeline: default cuda where there is one, else cpu.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare two clips: PSNR, SSIM and LPIPS, frame by frame, and both side by side.

    A and B are videos, moving pictures, folders of frames or safetensors files. Or A alone is the
    folder of a diffusers pipeline (or its hub id, once it is in the cache): it draws the clip
    dense and accelerated, from the same noise.

    Writes compare.html, compare.mp4 (compare.webp without an encoder) and compare.json. Exit
    status: 0; 1 where nothing was replaced, or the clips are less alike than was asked for; 2 for
    input that cannot be used.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    if label is not None and len(label) != 2:
        raise UserError(f"--label: expected two, for A and for B, found {len(label)}")
    if label is not None and label[0] == label[1]:
        raise UserError(f"--label: expected two that differ, found {label[0]!r} twice")
    made: dict[str, Any] = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "num_inference_steps": steps,
        "num_frames": frames,
        "height": height,
        "width": width,
        "guidance_scale": guidance,
    }
    given = {key: value for key, value in made.items() if value is not None}
    columns = (TextColumn("{task.description:10}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        pair = None
        if second is not None:
            only = {**given, "policy": policy, "inputs": inputs, "dtype": dtype, "device": device}
            if named := [name for name, value in only.items() if value is not None]:
                raise UserError(f"{named[0]} is for a pipeline, and B is given: leave one of them")
            clips = _read(Path(first)), _read(second)
            names = _names(first, str(second))
            about: dict[str, Any] = {}
        else:
            pair, about = _pair(first, policy, given, inputs, seed, dtype, device, progress)
            clips, names = (pair.dense, pair.fast), ("dense", "fpsattn")
        chosen = (label[0], label[1]) if label else names
        found, files = _compare(clips, chosen, fps, lpips, about, out, progress)
    failed = _failed(found, min_psnr, min_ssim)
    if json:
        told = {**found.as_dict(), "files": [str(file) for file in files], "failed": failed}
        if pair is not None:
            told["reports"] = [report.to_dict() for report in pair.reports]
        typer.echo(jsonlib.dumps(told))
    else:
        _show(found, files)
    for reason in failed:
        typer.secho(reason, fg=typer.colors.RED, err=True)
    if pair is not None and not pair.replaced:
        typer.secho(
            "no attention was replaced: both clips are dense; "
            + "; ".join(report.summary() for report in pair.reports),
            fg=typer.colors.RED,
            err=True,
        )
        raise typer.Exit(NOTHING_FOUND)
    if failed:
        raise typer.Exit(NOTHING_FOUND)


def _read(path: Path) -> "Clip":
    from fpsc.quality.clips import ClipError, read

    if (path / "model_index.json").is_file():
        raise UserError(f"{path} is a pipeline, which makes both clips: give it alone")
    try:
        return read(path)
    except ClipError as error:
        raise UserError(str(error)) from error


def _names(first: str, second: str) -> tuple[str, str]:
    """The names of the files; with their folders where those are all that differs."""
    a, b = Path(first), Path(second)
    if a.stem != b.stem:
        return a.stem, b.stem
    return (a.name, b.name) if a.name != b.name else (f"A: {first}", f"B: {second}")


def _pair(
    model: str,
    policy: str | None,
    arguments: dict[str, Any],
    inputs: Path | None,
    seed: int,
    dtype: Dtype | None,
    device: str | None,
    progress: "Progress",
) -> "tuple[Pair, dict[str, Any]]":
    import torch

    from fpsc.models.pipelines import load_pipeline
    from fpsc.policy import PolicyError, find
    from fpsc.quality.generate import pair

    on = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = dtype or (Dtype.float32 if on == "cpu" else Dtype.bfloat16)
    tensors = _tensors(inputs) if inputs else {}
    if "prompt" not in arguments and not tensors:
        raise UserError(
            f"{model}: a pipeline needs --prompt, or --inputs with its embeddings; or give the "
            "second clip as B"
        )
    if policy is not None:  # before anything that takes long
        try:
            find(policy)
        except PolicyError as error:
            raise UserError(str(error)) from error
    unused = () if "prompt" in arguments else ("text_encoder", "tokenizer")
    pipe = load_pipeline(
        model, getattr(torch, kind.value), on, without=unused, otherwise=": give B too"
    )
    pipe.set_progress_bar_config(disable=True)  # the command has its own
    tasks: dict[str, Any] = {}

    def on_step(side: str, done: int) -> None:
        if side not in tasks:
            tasks[side] = progress.add_task(side, total=pipe.num_timesteps)
        progress.update(tasks[side], completed=done)

    moved = {
        name: tensor.to(on, getattr(torch, kind) if tensor.is_floating_point() else None)
        for name, tensor in tensors.items()
    }
    try:
        made = pair(pipe, {**arguments, **moved}, seed=seed, policy=policy, on_step=on_step)
    except (PolicyError, ValueError, TypeError) as error:
        raise UserError(f"{type(pipe).__name__} did not run: {error}") from error
    about = {
        "pipeline": model,
        "class": type(pipe).__name__,
        **arguments,
        "inputs": sorted(tensors),
        "seed": seed,
        "device": on,
        "dtype": kind.value,
        "torch": torch.__version__,
        "policy": ", ".join(dict.fromkeys(r.policy for r in made.reports)),
        "replaced": made.replaced,
    }
    return made, about


def _tensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise UserError(f"--inputs {path} cannot be read as safetensors: {error}") from error


def _compare(
    clips: "tuple[Clip, Clip]",
    names: tuple[str, str],
    fps: float | None,
    lpips: Network,
    about: dict[str, Any],
    out: Path,
    progress: "Progress",
) -> "tuple[Comparison, list[Path]]":
    from dataclasses import replace

    from fpsc.quality import compare as quality
    from fpsc.quality.clips import write_tensor
    from fpsc.quality.lpips import Network as Lpips
    from fpsc.quality.pictures import h264, write_clip

    if fps is not None:
        clips = replace(clips[0], fps=fps), replace(clips[1], fps=fps)
    tasks: dict[str, Any] = {}

    def on_frame(label: str, done: int, total: int) -> None:
        if label not in tasks:
            tasks[label] = progress.add_task(label, total=total)
        progress.update(tasks[label], completed=done)

    try:
        found = quality.compare(
            *clips, names, network=Lpips(lpips.value), about=about, on_frame=on_frame
        )
        files = quality.write(found, out, on_frame)
        if about:  # clips that are nowhere else
            for name, clip in zip(("dense", "fpsattn"), clips, strict=True):
                files.append(out / f"{name}.safetensors")
                write_tensor(replace(clip, fps=found.fps), files[-1])
                if h264():
                    files.append(out / f"{name}.mp4")
                    write_clip(clip.frames, files[-1], fps=found.fps)
    except quality.MismatchError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{error}. Choose a folder that can be written with --out") from error
    return found, files


def _failed(found: "Comparison", min_psnr: float | None, min_ssim: float | None) -> list[str]:
    """What is less alike than was asked for; what was asked for and not computed counts too."""
    reasons = []
    for name, least in (("PSNR", min_psnr), ("SSIM", min_ssim)):
        measure = found.of(name)
        if least is None:
            continue
        if measure is None:
            reasons.append(f"{name}: expected {least:g} or more, and it could not be computed")
        elif measure.value < least:
            reasons.append(f"{name}: expected {least:g} or more, found {measure.value:.4g}")
    return reasons


def _show(found: "Comparison", files: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"{found.names[1]} against {found.names[0]}, {found.clips[0].size}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "whole clip", "worst frame", "there"):
        table.add_column(title, justify="right" if title else "left")
    for m in found.measures:
        digits = 2 if m.unit else 4
        value, worst = (f"{x:.{digits}f} {m.unit}".strip() for x in (m.value, m.by_frame[m.worst]))
        table.add_row(m.name, value, str(m.worst), worst)
    console.print(table)
    for reason in found.missing:
        console.print(f"not computed: {reason}", style="yellow", markup=False, soft_wrap=True)
    for file in files:
        console.print(str(file), markup=False, soft_wrap=True)
