"""`fpsc bench run`: measure some cases."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpsc.cli.bench.options import Dtype, grid_of, keeps_of, machine
from fpsc.cli.errors import NOTHING_FOUND
from fpsc.errors import UserError

if TYPE_CHECKING:
    from fpsc.bench.cases import Spec
    from fpsc.bench.record import Run
    from fpsc.bench.run import Plan


def run(
    cases: Annotated[
        list[str] | None,
        typer.Argument(help="Names of cases, or beginnings of names: see `fpsc bench list`."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Your own: a folder with config.json, a class of diffusers, a hub id."),
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="With a class of diffusers: a JSON file or inline JSON.")
    ] = None,
    level: Annotated[
        list[str] | None,
        typer.Option(help="With --model: what of it to measure. Repeatable."),
    ] = None,
    grid: Annotated[str | None, typer.Option(help="Token grid T,Y,X.", metavar="T,Y,X")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Instead of the model's.")] = None,
    text_tokens: Annotated[int | None, typer.Option(min=1, help="Instead of the model's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of a sampling loop.")] = None,
    keep: Annotated[
        list[float] | None, typer.Option(help="Fraction of key tiles to visit. Repeatable.")
    ] = None,
    policy: Annotated[
        list[str] | None, typer.Option(help="A policy's name or file. Repeatable.")
    ] = None,
    noise: Annotated[
        float | None, typer.Option(min=0, max=1, help="Level of a single denoising step.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="Of Inductor, for all that is compiled: max-autotune, ...")
    ] = "",
    emulate_fp8: Annotated[
        bool, typer.Option("--emulate-fp8", help="On a CPU: time FP8 as it is emulated.")
    ] = False,
    fp8_linears: Annotated[
        bool, typer.Option("--fp8-linears", help="Also with FP8 linear layers, by torchao.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="That count.")] = 7,
    seconds: Annotated[
        float, typer.Option(min=1, help="A case's rounds end about then, after three or more.")
    ] = 600.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the CPU.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and inputs.")] = 0,
    profile: Annotated[bool, typer.Option(help="Split the time by the profiler.")] = True,
    traces: Annotated[
        Path | None, typer.Option(help="A folder for traces that ui.perfetto.dev opens.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The record; one that is there is gone on with.")
    ] = Path("fpsc-bench.json"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Replace the record.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the record.")] = False,
) -> None:
    """Measure CASES, each beside every other way to compute the same.

    Finished cases are kept in the record after each, and a run that was interrupted goes on where
    it stopped. Exit status: 0 where every case was measured and is right; 1 where one failed, or a
    contender of fpsattn computes something wrong; 2 for input that cannot be used.
    """
    from fpsc.bench.measure import Effort
    from fpsc.bench.run import Plan

    here = machine(
        device=device,
        dtype=dtype,
        threads=threads,
        traces=traces,
        mode=mode,
        emulate_fp8=emulate_fp8,
        fp8_linears=fp8_linears,
        seed=seed,
        profile=profile,
    )
    sizes: dict[str, Any] = {
        "grid": None if grid is None else grid_of(grid),
        "layers": layers,
        "text_tokens": text_tokens,
        "batch": batch,
        "steps": steps,
        "keeps": None if keep is None else keeps_of(keep),
        "policies": None if policy is None else _policies(policy),
        "noise": noise,
    }
    if policy is not None and keep is None:
        sizes["keeps"] = ()
    given = {name: value for name, value in sizes.items() if value is not None}
    specs = [replace(spec, **given) for spec in _specs(cases, model, config, level, here.cuda)]
    plan = Plan(
        specs=specs,
        machine=here,
        effort=Effort(rounds=rounds, seconds=seconds),
        output=output,
        command=" ".join(["fpsc", *sys.argv[1:]]),
        forced=frozenset(given),
        fresh=fresh,
    )
    finish(measured(plan), output, json)


def measured(plan: "Plan") -> "Run":
    """Run a plan with progress and tables on standard error."""
    from fpsc.bench.record import Case
    from fpsc.bench.run import run as run_plan
    from fpsc.cli.bench.output import errors, progress, show_case

    with progress(len(plan.specs)) as (tell, bars):

        def on_case(case: Case) -> None:
            show_case(case, bars.console)
            bars.advance(bars.task_ids[0])

        try:
            return run_plan(plan, tell, on_case)
        except KeyboardInterrupt:
            bars.stop()
            errors().print(f"interrupted; finished cases are in {plan.output}, and are kept")
            raise typer.Exit(130) from None


def finish(run: "Run", output: Path, json: bool) -> None:
    """Say what came out, and end with the status that says so."""
    from fpsc.bench.record import Role, Status
    from fpsc.cli.bench.output import errors, heading, show_curves

    console = errors()
    show_curves(run.fits, run.break_evens, console)
    console.print(f"\n{heading(run)}\nrecord: {output}", highlight=False, markup=False)
    console.print(_page(run, output), highlight=False, markup=False)
    if json:
        typer.echo(run.text(), nl=False)
    bad = [case.name for case in run.cases if case.status is not Status.measured]
    bad += [
        f"{case.name}: {result.name}"
        for case in run.cases
        for result in case.results
        if result.role is Role.fpsattn and result.status in (Status.wrong, Status.failed)
    ]
    if bad:
        console.print(f"not right: {'; '.join(bad)}", style="red", markup=False)
        raise typer.Exit(NOTHING_FOUND)


def _page(run: "Run", output: Path) -> str:
    """Write the report beside the record; what became of it, in words."""
    page = output.with_suffix(".html")
    try:
        from fpsc.bench.report import write_run
    except ImportError as error:
        return f'no report: its charts need matplotlib ({error}): pip install "fpsc[pictures]"'
    write_run(run, output, page)
    return f"report: {page}"


def _specs(
    cases: list[str] | None,
    model: str | None,
    config: str | None,
    levels: list[str] | None,
    cuda: bool,
) -> "list[Spec]":
    from fpsc.bench.cases import Spec, chosen, registry
    from fpsc.bench.record import Level
    from fpsc.models.build import find_model

    if model is None:
        if config is not None or levels:
            raise UserError("--config and --level are for a model of your own: name it: --model")
        if not cases:
            raise UserError("name a case (`fpsc bench list` shows all), or your own --model")
        return chosen(cases, registry(cuda=cuda))
    if cases:
        raise UserError("CASES are of models known by name; for --model, choose with --level")
    from fpsc.models.known import KNOWN

    own = KNOWN[model].spec if model in KNOWN and config is None else find_model(model, config)
    names = levels or [str(Level.transformer)]
    unknown = [name for name in names if name not in Level.__members__]
    if unknown:
        raise UserError(f"--level {unknown[0]}: expected one of {', '.join(Level)}")
    label = Path(model).name or own.class_name
    return [Spec(f"{name}/{label}", Level(name), own=own, grid=(21, 30, 52)) for name in names]


def _policies(names: list[str]) -> tuple[str, ...]:
    from fpsc.bench.contenders import policy_of
    from fpsc.policy import PolicyError

    for name in names:
        try:
            policy_of(name)
        except PolicyError as error:
            raise UserError(str(error)) from error
    return tuple(names)
