"""HTML of templates, in which every number says which value it shows.

A number on a page is `<data value="0.0412341">41.2 ms</data>`: what a person reads, and the value
of the record that it stands for. Nothing else on a page may hold a number of a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fpsc.files import replacing
from fpsc.pages import numbers

HERE = Path(__file__).parent


def render(template: str, /, **values: Any) -> str:
    """The page of a template in this folder."""
    return _environment().get_template(template).render(**values)


def write(path: Path, text: str) -> None:
    """Write a page: the whole of it, or nothing."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def tagged(show: Callable[..., str]) -> Callable[..., Markup]:
    """A way to write numbers, as an element that holds the value too."""

    def element(value: float, *more: Any) -> Markup:
        return Markup('<data value="{}">{}</data>').format(repr(value), show(value, *more))

    return element


def by(sizes: Sequence[int]) -> Markup:
    """Sizes of a box."""
    return Markup(" × ").join(map(tagged(numbers.whole), sizes))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    ways = {
        "number": numbers.whole,
        "seconds": numbers.seconds,
        "size": numbers.size,
        "times": numbers.times,
        "error": numbers.error,
        "percent": numbers.percent,
        "plain": numbers.plain,
        "decibel": numbers.decibel,
    }
    environment.filters.update({name: tagged(show) for name, show in ways.items()}, by=by)
    return environment
