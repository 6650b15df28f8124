"""How `fpsc inspect` shows what it found: a table for people, one object for programs."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from fpsc.report import Site


@dataclass(frozen=True)
class Inspection:
    """One inspected model.

    `sites` holds (number of the graph, site) in graph order; `breaks` the reasons of graph breaks
    and how often each occurred; `problem` why the forward stopped before its end, if it did.
    """

    class_name: str
    origin: str
    policy: str
    dtype: str
    grid: tuple[int, int, int]
    graphs: int
    breaks: dict[str, int]
    problem: str | None
    sites: "list[tuple[int, Site]]"

    @property
    def replaced(self) -> int:
        return sum(site.replaced for _, site in self.sites)


def as_json(found: Inspection) -> dict[str, Any]:
    """Plain values only, for `json.dumps`."""
    return {
        "model": found.class_name,
        "config": found.origin,
        "policy": found.policy,
        "dtype": found.dtype,
        "grid": list(found.grid),
        "graphs": found.graphs,
        "graph_breaks": found.breaks,
        "problem": found.problem,
        "replaced": found.replaced,
        "sites": [
            {
                "graph": graph,
                "name": site.name,
                "role": str(site.role),
                "replaced": site.replaced,
                "reason": site.reason,
                "grid": None if site.grid is None else list(site.grid),
                "grid_source": site.grid_source,
                "q_shape": list(site.q_shape),
            }
            for graph, site in found.sites
        ],
    }


def show(found: Inspection, *, every: bool, console: Console | None = None) -> None:
    """Print a table. Without `every`, sites that differ only in their name share a row."""
    console = console or Console()
    t, y, x = found.grid
    console.print(
        f"{found.class_name} ({found.origin}), {found.dtype}, grid {t} x {y} x {x} = "
        f"{t * y * x:,} tokens, policy {found.policy}, {_count(found.graphs, 'graph')}",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("sites", "role", "q [B, H, N, D]", "grid", "", "why"):
        table.add_column(title, overflow="fold")
    for row, names in _rows(found, every):
        role, shape, grid, replaced, reason = row
        state = Text("replaced", "green") if replaced else Text("kept", "yellow")
        table.add_row(_names(names), role, shape, grid, state, reason)
    if found.sites:
        console.print(table)
    console.print(f"replaced {found.replaced} of {_count(len(found.sites), 'attention')}")
    for reason, times in found.breaks.items():
        console.print(f"graph break ({times} x): {reason}", soft_wrap=True, markup=False)
    if found.problem:
        console.print(
            f"the forward stopped before its end, later attentions are not shown: {found.problem}",
            style="red",
            soft_wrap=True,
            markup=False,
        )


Row = tuple[str, str, str, bool, str]


def _rows(found: Inspection, every: bool) -> list[tuple[Row, list[str]]]:
    """What a row shows, and the names of the sites that it stands for, by first occurrence."""
    rows: list[tuple[Row, list[str]]] = []
    place: dict[Row, int] = {}
    for _, site in found.sites:
        shape = "x".join(map(str, site.q_shape)) if site.q_shape else ""
        grid = "x".join(map(str, site.grid)) if site.grid else ""
        why = f"grid from the {site.grid_source}" if site.replaced else site.reason
        row = (str(site.role), shape, grid, site.replaced, why)
        if every or row not in place:
            place[row] = len(rows)
            rows.append((row, []))
        rows[place[row]][1].append(site.name)
    return rows


def _names(names: list[str]) -> str:
    """One line for names that differ only in their numbers, `blocks.*.attn1 (40)`."""
    if len(names) == 1:
        return names[0]
    kinds = list(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))
    return f"{', '.join(kinds)} ({len(names)})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
