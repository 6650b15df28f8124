"""An SVG takes the colours of its page, and can stand there beside others."""

import re
from xml.etree import ElementTree

from fpsc.pages import charts
from tests.pages.reading import Page


def drawn(name: str) -> charts.Chart:
    with charts.style():
        figure, axes = charts.figure(4, 2)
        axes.plot([1, 2], [3, 4], color=charts.SERIES[1], label="a < b & c")
        axes.barh([0], [1], facecolor=charts.SERIES[0], hatch="//", edgecolor=charts.PAPER)
        axes.legend()
    return charts.chart(name, 'A "title" <x>', "What & why", figure)


def test_colours_are_variables_of_the_page() -> None:
    svg = str(drawn("one").svg)
    assert {"ink", "soft", "grid", "paper", "series-0", "series-1"} <= set(
        re.findall(r"var\(--([\w-]+)\)", svg)
    )
    assert not re.findall(r"#[0-9a-f]{6}\b", svg)


def test_every_variable_is_defined_light_and_dark() -> None:
    css = (charts.__file__.rsplit("/", 1)[0]) + "/page.css"
    with open(css, encoding="utf-8") as file:
        text = file.read()
    for name in charts._VARIABLES.values():
        assert text.count(f"--{name}:") == 2, name


def test_it_is_well_formed_and_says_what_it_shows() -> None:
    svg = str(drawn("one").svg)
    root = ElementTree.fromstring(svg)
    assert root.attrib["role"] == "img"
    words = "".join(root.itertext())
    assert 'A "title" <x>' in words and "What & why" in words
    assert "a < b & c" in words  # text stays text


def test_two_of_them_share_no_id_and_refer_to_their_own() -> None:
    one, two = (str(drawn(name).svg) for name in ("one", "two"))
    page = Page(one + two)
    assert len(page.ids) == len(set(page.ids)) > 10
    for svg, name in ((one, "one"), (two, "two")):
        targets = re.findall(r'(?:href="#|url\(#)([^")]+)', svg)
        assert targets
        assert all(target in page.ids and target.startswith(f"{name}-") for target in targets)


def test_the_same_figure_is_the_same_text() -> None:
    assert drawn("one") == drawn("one")
