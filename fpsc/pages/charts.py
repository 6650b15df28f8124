"""Charts of matplotlib as inline SVG, whose colours are those of the page, light or dark.

A chart is drawn in the colours below, which nobody sees: each is a name that becomes a variable of
the page's style sheet.
"""

from __future__ import annotations

import io
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, SOFT, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
SERIES = tuple(f"#01020{i}" for i in range(8))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "\\\\", "..", "xx", "--", "++", "oo")
"""Series differ in their marks too: not everybody tells colours apart."""

_VARIABLES = {
    INK: "ink",
    SOFT: "soft",
    GRID: "grid",
    PAPER: "paper",
    **{colour: f"series-{i}" for i, colour in enumerate(SERIES)},
}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be read out, searched and copied
    "svg.hashsalt": "fpsc",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "legend.fontsize": 9,
    "hatch.color": PAPER,
    "hatch.linewidth": 0.8,
    "path.simplify": False,
}


@dataclass(frozen=True)
class Chart:
    """An SVG with its title and a sentence that says what it shows."""

    name: str
    title: str
    description: str
    svg: Markup


def style() -> AbstractContextManager[None]:
    """The settings that a figure is drawn with: `with style(): ...`."""
    return matplotlib.rc_context(_STYLE)


def figure(width: float = 8, height: float = 3) -> tuple[Figure, Axes]:
    """An empty chart, in inches; call it inside `with style()`."""
    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.add_subplot()


def chart(name: str, title: str, description: str, drawn: Figure) -> Chart:
    """A figure as inline SVG.

    name: letters, digits and dashes; one chart of that name a page.
    """
    buffer = io.StringIO()
    with style():
        drawn.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    # Every figure calls its parts figure_1, axes_1 and so on: ids of a page are unique.
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"#0[01]0[0-9a-f]{3}", lambda m: _variable(m.group()), text)
    text = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Those of equal pictures are equal too, and nothing refers to them.
    text = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", text)
    width = f"{drawn.get_figwidth() * 96:.0f}px"
    head = Markup(
        '<svg role="img" aria-labelledby="{0}-title {0}-description" style="max-width: {1}"'
    ).format(name, width)
    told = Markup('<title id="{0}-title">{1}</title><desc id="{0}-description">{2}</desc>').format(
        name, title, description
    )
    opening, _, rest = text.removeprefix("<svg").partition(">")
    return Chart(name, title, description, Markup(f"{head}{opening}>{told}{rest}"))


def _variable(colour: str) -> str:
    name = _VARIABLES.get(colour)
    return f"var(--{name})" if name else colour
