"""A record as a Markdown table: what README and documents quote."""

from __future__ import annotations

from collections.abc import Sequence

from fpsc.bench.record import Case, Quartiles, Result, Role, Run
from fpsc.pages import numbers

NONE = "–"
HEAD = ("case", "contender", "time", "against the best other", "against eager", "error")


def table(run: Run) -> str:
    """Every measured result of fpsattn, beside the best of what could be used instead."""
    rows = [
        _row(case, result)
        for case in run.cases
        for result in case.measured
        if result.role is Role.fpsattn
    ]
    return markdown(HEAD, rows)


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


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with a line for each row; a bar inside a cell is escaped."""
    lines = [_line(head), "|" + "---|" * len(head), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _times(ratio: Quartiles | None) -> str:
    return numbers.times(ratio.median) if ratio else NONE
