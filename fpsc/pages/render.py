"""HTML of templates, in which every number says which value it shows.

A number on a page is `<data value="0.0412341">41.2 ms</data>`: what a person reads, and the value
of the record that it stands for. Nothing else on a page may hold a number of a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fpsc.files import replacing

HERE = Path(__file__).parent


def render(template: str, /, **values: Any) -> str:
    """The page of a template in this folder."""
    return _environment().get_template(template).render(**values)


def write(path: Path, text: str) -> None:
    """Write a page: the whole of it, or nothing."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def number(value: float, shown: str | None = None) -> Markup:
    """A value, and how it is shown."""
    text = f"{value:,}" if shown is None else shown
    return Markup('<data value="{}">{}</data>').format(repr(value), text)


def seconds(value: float, like: float | None = None) -> Markup:
    """Three digits, in the unit that suits it, or `like` where that is given."""
    suits = value if like is None else like
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms")):
        if 0 < suits < limit:
            return number(value, f"{_digits(value * factor)} {unit}")
    return number(value, f"{_digits(value)} s")


def size(value: int) -> Markup:
    """Bytes, in the binary unit that suits."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(value) >= 1024**power:
            return number(value, f"{_digits(value / 1024**power)} {unit}")
    return number(value, f"{value} B")


def times(value: float) -> Markup:
    """A ratio of speeds."""
    return number(value, f"{value:.2f}×" if value < 99.95 else f"{value:,.0f}×")


def error(value: float) -> Markup:
    """A relative error."""
    return number(value, "0" if value == 0 else f"{value:.1e}")


def percent(value: float) -> Markup:
    """A share."""
    return number(value, f"{value:.0%}" if value >= 0.0995 or value == 0 else f"{value:.1%}")


def plain(value: float) -> Markup:
    """A number without a unit, four digits."""
    return number(value, f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}")


def decibel(value: float) -> Markup:
    """A PSNR; of equal pictures it is infinite."""
    return number(value, "∞ dB" if math.isinf(value) else f"{value:.2f} dB")


def by(sizes: Sequence[int]) -> Markup:
    """Sizes of a box."""
    return Markup(" × ").join(number(n) for n in sizes)


def _digits(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if 1e-3 <= value < 999.5 else f"{value:,.0f}"


FILTERS: Mapping[str, Any] = {
    "number": number,
    "seconds": seconds,
    "size": size,
    "times": times,
    "error": error,
    "percent": percent,
    "plain": plain,
    "decibel": decibel,
    "by": by,
}


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(FILTERS)
    return environment
