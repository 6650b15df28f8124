"""A record as a Markdown table: what README and documents quote."""

from __future__ import annotations

from collections.abc import Sequence

from fpsc.bench.record import Case, Fit, Quartiles, Result, Role, Run, Split
from fpsc.pages import numbers

NONE = "–"
HEAD = ("case", "contender", "time", "against the best other", "against eager", "error")
SPLIT_HEAD = ("where the time goes", "attention", "linear layers", "rest", "if attention were free")
FIT_HEAD = ("cost against", "contender", "exponent", "leaving one point out", "overhead")


def table(run: Run) -> str:
    """Every measured result of fpsattn, beside the best of what could be used instead.

    Below it, where the record has them: where the time goes before and after, and how cost grows.
    """
    results = [(case, result) for case in run.cases for result in case.measured]
    ours = [_row(*pair) for pair in results if pair[1].role is Role.fpsattn]
    splits = [_split(result.name, result.split) for _, result in results if result.split]
    fits = [_fit(fit) for fit in run.fits]
    tables = [markdown(HEAD, ours)]
    tables += [
        markdown(head, rows) for head, rows in ((SPLIT_HEAD, splits), (FIT_HEAD, fits)) if rows
    ]
    return "\n".join(tables)


def _row(case: Case, result: Result) -> tuple[str, ...]:
    reduced = " (reduced)" if case.problem.reduced else ""
    other = f" of {result.best}" if result.best and result.to_best else ""
    return (
        f"{case.name}{reduced}",
        result.name,
        numbers.seconds(result.seconds.median) if result.seconds else NONE,
        _times(result.to_best) + other,
        _times(result.to_eager),
        NONE if result.error is None else numbers.error(result.error),
    )


def _split(name: str, split: Split) -> tuple[str, ...]:
    parts = (split.attention, split.linear, split.rest)
    cells = (f"{numbers.seconds(x)}, {numbers.percent(x / (split.total or 1))}" for x in parts)
    return (name, *cells, numbers.times(split.bound()))


def _fit(fit: Fit) -> tuple[str, ...]:
    low_high = fit.exponent_range
    return (
        fit.axis,
        fit.contender,
        f"{fit.exponent:.2f}",
        f"{low_high[0]:.2f} to {low_high[1]:.2f}" if low_high else NONE,
        numbers.seconds(fit.overhead) if fit.overhead else NONE,
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a line for each row; a bar inside a cell is escaped."""
    lines = [_line(head), "|" + "---|" * len(head), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _times(ratio: Quartiles | None) -> str:
    return numbers.times(ratio.median) if ratio else NONE
