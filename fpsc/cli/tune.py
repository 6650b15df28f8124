"""`fpsc tune`: policies for a model, from one calibration and any budget."""

import json as jsonlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpsc.cli.errors import NOTHING_FOUND, UserError
from fpsc.cli.inspect import Dtype

if TYPE_CHECKING:
    from rich.console import Console

    from fpsc.bench.progress import Tell
    from fpsc.tune.calibrate import Settings
    from fpsc.tune.record import Calibration
    from fpsc.tune.subjects import Subject
    from fpsc.tune.tune import Result

DEMO = "demo"


class CostKind(StrEnum):
    measured = "measured"
    pairs = "pairs"


def tune(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="demo, a diffusers pipeline (a folder, or a hub id in the cache), or with "
            "--inputs the folder of a transformer. Not needed with --from.",
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=VALUE",
            help="keep=0.25, attention=0.4, time=0.7, time=40s or error=0.1. Repeatable. Default: "
            "keep=0.25.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for calibration, policies and report.")] = Path(
        "fpsc-tune"
    ),
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="Solve this calibration again; with MODEL also validate."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Pipeline: a text file with a prompt in each line.")
    ] = None,
    inputs: Annotated[
        Path | None,
        typer.Option(help="Transformer: a folder of safetensors with `latents` and arguments."),
    ] = None,
    measure: Annotated[int, typer.Option(min=1, help="Prompts that are measured on.")] = 3,
    carried: Annotated[
        int, typer.Option(min=1, help="Of these, sampled once more for each bin of noise.")
    ] = 2,
    held_out: Annotated[
        int, typer.Option(min=0, help="Prompts behind these that policies are validated on.")
    ] = 2,
    within: Annotated[
        float, typer.Option(min=1, help="How wrong a prediction may be to be written, a factor.")
    ] = 2.0,
    bins: Annotated[int, typer.Option(min=1, max=16, help="Of noise, of equally many steps.")] = 5,
    edges: Annotated[
        str | None, typer.Option(metavar="1,...,0", help="Of the bins; instead of --bins.")
    ] = None,
    pattern: Annotated[
        list[str] | None, typer.Option(help="Candidates: a pattern. Repeatable, as the next four.")
    ] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Candidates.")] = None,
    mode_dtype: Annotated[list[str] | None, typer.Option(help="Candidates: bf16, fp8.")] = None,
    scales: Annotated[
        list[str] | None,
        typer.Option(help="Candidates of fp8: tile, intermediate, coarse, head."),
    ] = None,
    cost: Annotated[
        CostKind, typer.Option(help="Of a mode: timed on this device, or its pairs counted.")
    ] = CostKind.measured,
    monotone: Annotated[
        bool, typer.Option("--monotone", help="No head keeps more at less noise.")
    ] = False,
    smooth: Annotated[
        float, typer.Option(min=0, help="What a change of mode between bins must save.")
    ] = 0.0,
    lines: Annotated[int, typer.Option(min=0, help="Rules of the simplified policy.")] = 8,
    steps: Annotated[int | None, typer.Option(min=2, help="Sampling steps.")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Pipeline.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pipeline: pixels.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pipeline: pixels.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Pipeline: guidance scale.")] = None,
    component: Annotated[
        str, typer.Option(help="Pipeline: the transformer that is tuned.")
    ] = "transformer",
    seed: Annotated[int, typer.Option(min=0, max=9999, help="Of prompts and noise.")] = 0,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: bfloat16 on a GPU, else float32.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one.")] = None,
    report: Annotated[
        bool | None,
        typer.Option(help="Write tune.html and tune.png. Default: unless with --from."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Find policies for MODEL that lose least under a budget.

    One calibration measures what every mode does in every head at some levels of noise; then each
    budget is solved in seconds, checked on prompts that nothing was measured on, and written: a
    policy with a table, one of a few lines, and a Pareto set. The calibration goes on where it was
    interrupted; under `accelerate launch` each process takes a part of the prompts.

    Exit status: 0; 1 where a policy was not written because its prediction was wrong; 2 for input
    that cannot be used.
    """
    from fpsc.tune.budget import parse
    from fpsc.tune.choose import Wishes, choose
    from fpsc.tune.record import Calibration

    if model is None and from_ is None:
        raise UserError("name a MODEL (`fpsc tune demo`), or a calibration with --from")
    budgets = [parse(text) for text in budget or ["keep=0.25"]]
    wishes = Wishes(monotone=monotone, smooth=smooth, lines=lines)
    settings = None
    if from_ is None:
        settings = _settings(
            measure, carried, bins, edges, pattern, keep, mode_dtype, scales, cost, seed
        )
    _writable(out)
    subject = None
    if model is not None:
        given = {
            "num_inference_steps": steps,
            "num_frames": frames,
            "height": height,
            "width": width,
            "guidance_scale": guidance,
        }
        arguments = {name: value for name, value in given.items() if value is not None}
        subject = _subject(model, prompts, inputs, arguments, component, seed, dtype, device)
    with _progress() as (tell, console):
        if from_ is not None:
            calibration = Calibration.load(from_)
        else:
            assert subject is not None and settings is not None
            if subject.prompts < measure + held_out:
                raise UserError(
                    f"{subject.prompts} prompts, and --measure {measure} and --held-out {held_out} "
                    f"need {measure + held_out}: give more, or ask for fewer"
                )
            calibration = _calibrated(subject, settings, out, fresh, tell, console)
            if int(os.environ.get("RANK", "0")):
                return  # the first process goes on alone
        for wanted in budgets:  # before anything runs that takes long
            choose(calibration, wanted, wishes, simplify=False)
        result = _tuned(calibration, budgets, wishes, out, subject, held_out, within, tell)
    files = _files(result, out, report if report is not None else from_ is None)
    if json:
        told = {
            "model": calibration.facts.model,
            "policies": [each.as_dict() for each in result.tuned],
            "pareto": [str(path) for _, path in result.front],
            "files": [str(path) for path in files],
        }
        typer.echo(jsonlib.dumps(told))
    else:
        _show(result, files)
    for each in result.refused:
        typer.secho(each.refused, fg=typer.colors.RED, err=True)
    if result.refused:
        raise typer.Exit(NOTHING_FOUND)


def _writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{error}. Choose a folder that can be written with --out") from None


def _subject(
    model: str,
    prompts: Path | None,
    inputs: Path | None,
    arguments: dict[str, Any],
    component: str,
    seed: int,
    dtype: Dtype | None,
    device: str | None,
) -> "Subject":
    import torch

    from fpsc.models.pipelines import load_pipeline
    from fpsc.tune import subjects

    if model == DEMO:
        only = [name for name in arguments if name != "num_inference_steps"]
        if only or prompts or inputs:
            raise UserError(
                f"the demo draws its own prompts and has one size: leave out "
                f"{(only or ['--prompts' if prompts else '--inputs'])[0]}"
            )
        return subjects.demo(seed, arguments.get("num_inference_steps", 20))
    local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    on = device or (local if torch.cuda.is_available() else "cpu")
    kind = getattr(torch, (dtype or (Dtype.float32 if on == "cpu" else Dtype.bfloat16)).value)
    if inputs is not None:
        samples = subjects.read_samples(inputs)
        levels = arguments.get("num_inference_steps", 10)
        loaded = _transformer(model, kind, on)
        return subjects.latents(loaded, samples, levels=levels, seed=seed, name=model)
    if prompts is None:
        raise UserError(
            f"{model}: a pipeline needs --prompts, a text file with a prompt in each line; a "
            "transformer alone needs --inputs"
        )
    try:
        text = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {prompts}: {error}") from error
    pipe = load_pipeline(model, kind, on, otherwise="; for a transformer alone, give --inputs")
    named = [line for line in text if line]
    return subjects.pipeline(pipe, named, arguments, component=component, seed=seed, name=model)


def _transformer(model: str, dtype: Any, device: str) -> Any:
    """The transformer of a folder, with its weights."""
    import diffusers

    from fpsc.models.build import find_model

    folder = Path(model).expanduser()
    spec = find_model(model)
    loader: Any = getattr(diffusers, spec.class_name, None)
    if loader is None or not folder.is_dir():
        raise UserError(f"{model}: expected the folder of a transformer of diffusers")
    where = folder if (folder / "config.json").is_file() else folder / "transformer"
    try:
        loaded = loader.from_pretrained(
            where, torch_dtype=dtype, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{where} cannot be loaded: {error}") from error
    return loaded.to(device).eval().requires_grad_(False)


def _settings(
    measure: int,
    carried: int,
    bins: int,
    edges: str | None,
    pattern: list[str] | None,
    keep: list[float] | None,
    mode_dtype: list[str] | None,
    scales: list[str] | None,
    cost: CostKind,
    seed: int,
) -> "Settings":
    from fpsc.policy import PolicyError
    from fpsc.tune import modes
    from fpsc.tune.calibrate import Settings

    candidates = modes.default()
    if pattern or keep or mode_dtype or scales:
        candidates = modes.product(
            pattern or ["near"],
            keep or [0.0625, 0.125, 0.25, 0.5, 0.75],
            mode_dtype or ["bf16", "fp8"],
            scales or ["tile"],
        )
    try:
        modes.policy(candidates)
    except PolicyError as error:
        raise UserError(f"candidates: {error}") from error
    try:
        cuts = tuple(round(float(x), 5) for x in edges.split(",")) if edges else ()
    except ValueError:
        raise UserError(f"--edges {edges}: expected numbers from 1 down to 0, as 1,0.9,0") from None
    return Settings(
        candidates=candidates,
        prompts=measure,
        carried=min(carried, measure),
        bins=bins,
        edges=cuts,
        cost="pairs" if cost is CostKind.pairs else "measured",
        seed=seed,
    )


def _calibrated(
    subject: "Subject",
    settings: "Settings",
    out: Path,
    fresh: bool,
    tell: "Tell",
    console: "Console",
) -> "Calibration":
    from fpsc.tune.calibrate import calibrate

    try:
        return calibrate(subject, settings, out, fresh=fresh, tell=tell)
    except KeyboardInterrupt:
        console.print(f"interrupted; what was measured is in {out}, and is gone on with")
        raise typer.Exit(130) from None
    except OSError as error:
        raise UserError(f"{error}. Choose a folder that can be written with --out") from error


def _tuned(
    calibration: "Calibration",
    budgets: Any,
    wishes: Any,
    out: Path,
    subject: "Subject | None",
    held_out: int,
    within: float,
    tell: "Tell",
) -> "Result":
    from fpsc.tune.tune import tune as run

    prompts: list[int] = []
    if subject is not None and held_out:
        from fpsc.tune import validate

        prompts = validate.held_out(calibration, subject, held_out)
    return run(
        calibration,
        budgets,
        wishes,
        out,
        subject=subject,
        prompts=prompts,
        within=within,
        tell=tell,
    )


@contextmanager
def _progress() -> "Iterator[tuple[Tell, Console]]":
    """A bar on standard error; what is said without a count stays as a line above it."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from fpsc.cli.bench.output import errors

    columns = (TextColumn("{task.description:56}"), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=errors(), transient=True
    ) as bars:
        task = bars.add_task("starting", total=None)

        def tell(what: str, done: int = 0, total: int = 0) -> None:
            if total:
                bars.update(task, description=what[:56], completed=done, total=total)
            else:
                bars.console.print(what, highlight=False, markup=False)

        yield tell, bars.console


def _files(result: "Result", out: Path, report: bool) -> list[Path]:
    """Write the record, and the report where it is wanted."""
    from fpsc.tune.tune import write_record

    files = [out / "tune.json"]
    write_record(result, files[0])
    if report:
        try:
            from fpsc.tune.report import write
        except ImportError as error:
            typer.secho(
                f'no report: its charts need matplotlib ({error}): pip install "fpsc[pictures]"',
                fg=typer.colors.YELLOW,
                err=True,
            )
        else:
            files += write(result, out)
    return files


def _show(result: "Result", files: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    run = result.calibration.run
    console.print(
        f"{result.calibration.facts.model}: {run.layers} layers of {run.heads} heads, "
        f"{run.bins} bins of noise, {len(run.keep)} modes",
        markup=False,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = ("policy", "keep", "attention", "time", "error: predicted", "held out", "gap", "lines")
    for title in titles:
        table.add_column(title, justify="left" if title == "policy" else "right")
    for each in result.tuned:
        p, found = each.predicted, each.validation
        table.add_row(
            each.name if each.file else f"{each.name} (not written)",
            f"{p.keep:.3f}",
            f"{p.attention:.3f}",
            "-" if p.time is None else f"{p.time:.3f}",
            f"{p.error:.4f}",
            "not run" if found is None else f"{found.error:.4f}",
            f"{each.gap:.2%}" if each.lines is None else "",
            "table" if each.lines is None else str(each.lines),
        )
    console.print(table)
    console.print("attention, time: of the dense run's; error: of the result, relative to dense")
    paths = [each.file for each in result.tuned if each.file]
    if result.front:
        files = [*files, result.front[0][1].parent]
    for path in [*paths, *files]:
        console.print(str(path), markup=False, soft_wrap=True)
