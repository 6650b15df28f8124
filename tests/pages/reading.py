"""What a page says, read as a browser would."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from itertools import pairwise

HIDDEN = {"style", "script", "svg"}
"""What is not text for people; what an SVG draws is tested where it is drawn."""
VOID = {"meta", "link", "input", "br", "img", "hr"}


@dataclass
class Page(HTMLParser):
    """values: of every `<data>`, with what it shows. text: all else that people read."""

    source: str
    values: list[tuple[float, str]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)
    headings: list[tuple[int, str]] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self._value: float | None = None
        self.feed(self.source)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        self.references += [
            str(given[name]) for name in ("href", "src", "xlink:href") if given.get(name)
        ]
        if tag == "data":
            self._value = float(str(given["value"]))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if HIDDEN & set(self.open):
            return
        if self.open and self.open[-1] == "data":
            assert self._value is not None
            self.values.append((self._value, data))
        elif data.strip():
            self.text.append(" ".join(data.split()))


def check_alone(page: Page) -> None:
    """The page needs nothing else, and its parts can be told apart."""
    assert len(page.ids) == len(set(page.ids))
    for reference in page.references:
        assert reference.startswith(("#", "data:")), reference
        if reference.startswith("#"):
            assert reference[1:] in page.ids, reference
    assert not re.search(r"url\((?!#|data:)|@import", page.source)
    assert "default-src 'none'" in page.source and '<html lang="en">' in page.source
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    for svg in re.findall(r"<svg\b[^>]*>", page.source):
        title, description = re.findall(r'aria-labelledby="(\S+) (\S+)"', svg)[0]
        assert 'role="img"' in svg and title in page.ids and description in page.ids


def undeclared(page: Page, known: str) -> list[str]:
    """Words with digits that are neither a `<data>` nor a word of `known`."""
    said = _words(" ".join(page.text)) - _words(known)
    return sorted(word for word in said if re.search(r"\d", word))


def _words(text: str) -> set[str]:
    return {word.strip(".,;:()") for word in text.split()}
