"""How `fpsc bench` shows what it measures: progress while it runs, a table for each case."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from fpsc.bench.progress import Tell
    from fpsc.bench.record import BreakEven, Case, Fit, Quartiles, Result, Run

WIDTH = 140


@contextmanager
def progress(total: int) -> Iterator[tuple["Tell", "Progress"]]:
    """A bar for the cases and a line for what is going on, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[part]}"))
    with Progress(*columns, TimeElapsedColumn(), console=errors(), transient=True) as bars:
        task = bars.add_task("starting", total=total, part="")

        def tell(what: str, done: int = 0, total: int = 0) -> None:
            part = f"{done}/{total}" if total else ""
            bars.update(task, description=what[:70], part=part)

        yield tell, bars


def errors() -> Console:
    """On standard error; wide enough for the tables where that is no terminal."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else WIDTH)


def heading(run: "Run") -> str:
    there = run.environment
    device = there.device.name
    threads = f", {there.threads} threads" if there.device.kind == "cpu" else ""
    return (
        f"{device}{threads}; torch {there.packages['torch']}, triton "
        f"{there.packages.get('triton') or 'not installed'}, fpsc {there.fpsc or 'from source'}"
        f"{f' at {there.commit}' if there.commit else ''}; load {there.load}"
    )


def show_case(case: "Case", console: Console) -> None:
    """What was measured, fastest first, then what was not, and why."""
    p = case.problem
    size = "x".join(map(str, p.grid))
    console.print(
        f"\n[bold]{case.name}[/bold]  {p.model or p.model_class or 'one op'}, {p.layers} layers, "
        f"grid {size} ({p.tokens:,} tokens), batch {p.batch}, {p.dtype}",
        highlight=False,
    )
    if p.reduced:
        console.print(f"reduced: {'; '.join(p.reduced)}", style="yellow", highlight=False)
    if case.reason:
        console.print(f"{case.status}: {case.reason}", style="red", markup=False)
    timed = sorted(case.measured, key=lambda r: r.seconds.median if r.seconds else 0.0)
    if timed:
        console.print(_times(case, timed))
    split = [r for r in case.results if r.split is not None]
    if split:
        console.print(_splits(split))
    if any(r.memory for r in timed):
        table = Table("", "peak", box=None, pad_edge=False)
        for r in timed:
            if r.memory:
                table.add_row(r.name, f"{r.memory.peak / 2**20:,.0f} MiB ({r.memory.source})")
        console.print(table)
    for result in case.results:
        if result.steps and result.policy:
            console.print(_steps(result))
    left: dict[str, list[str]] = {}
    for r in case.results:
        if r.reason:
            left.setdefault(f"{r.status}: {r.reason}", []).append(r.name)
    for why, names in left.items():
        console.print(f"  {'; '.join(names)}: {why}", style="dim", markup=False)
    for note in case.notes:
        console.print(f"  note: {note}", style="dim", markup=False)


def _times(case: "Case", timed: "list[Result]") -> Table:
    columns = ("", "median", "quartiles", "to eager", "to the best", "error", "error, FP8", "gates")
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for r in timed:
        if r.seconds is None:
            continue
        wins = r.to_best is not None and r.to_best.median > 1
        ours = r.role == "fpsattn"
        style = ("green" if wins else "red") if ours else ""
        table.add_row(
            r.name,
            duration(r.seconds.median),
            f"{duration(r.seconds.q1)} .. {duration(r.seconds.q3)}",
            times(r.to_eager),
            f"{times(r.to_best)} {r.best}" if r.best and r.best != r.name else times(r.to_best),
            _error(r.error),
            _error(r.error_fp8),
            "green" if r.gates else "",
            style=style,
        )
    return table


def _splits(results: "list[Result]") -> Table:
    columns = ("where it goes", "attention", "linear", "rest", "bound, attention free")
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for r in results:
        s = r.split
        if s is None:
            continue
        parts = (s.attention, s.linear, s.rest)
        cells = [f"{duration(part)} {part / (s.total or 1):4.0%}" for part in parts]
        table.add_row(r.name, *cells, f"{s.bound():.2f}x")
    return table


def _steps(result: "Result") -> Table:
    columns = ("step", "noise", "modes", "keep", "median")
    table = Table(*columns, box=None, pad_edge=False, title=result.name, title_justify="left")
    for step in result.steps:
        keep = "" if step.keep is None else f"{step.keep:.2f}"
        modes = ", ".join(step.modes)
        median = duration(step.seconds.median)
        table.add_row(str(step.index), f"{step.noise:.3f}", modes, keep, median)
    return table


def show_curves(fits: "tuple[Fit, ...]", evens: "tuple[BreakEven, ...]", console: Console) -> None:
    if fits:
        columns = ("cost against", "", "exponent", "left one out", "overhead", "dominates below")
        table = Table(*columns, box=None, pad_edge=False, header_style="bold")
        for f in fits:
            low_high = f.exponent_range
            table.add_row(
                f.axis,
                f.contender,
                f"{f.exponent:.2f}",
                f"{low_high[0]:.2f} .. {low_high[1]:.2f}" if low_high else "",
                duration(f.overhead),
                f"{f.dominated_below:,.3g}" if f.dominated_below else "",
            )
        console.print()
        console.print(table)
    for even in evens:
        where = f"{even.faster} {even.at:,.3g} {even.axis}" if even.at else even.faster
        console.print(f"{even.contender} is faster than {even.against}: {where}", highlight=False)


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def times(ratio: "Quartiles | None") -> str:
    return "" if ratio is None else f"{ratio.median:.2f}x"


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"
