"""One exception for everything that can be wrong with a policy, with the place and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

MAX_SHOWN = 10
"""Problems that one message lists; the rest are counted."""


class Problem(NamedTuple):
    """One thing that is wrong: where (line and column count from 1) and what.

    `file` is None for a problem in the policy itself, else the file that it takes something from.
    """

    line: int | None
    column: int | None
    message: str
    file: str | None = None


class PolicyError(ValueError):
    """A policy that cannot be used as it is.

    `str()` is one line a problem, "file:line:column: message", in the order of the file. Each
    message names the key, what was expected and what was found.

    Attributes:
        file: what the policy was read from.
        problems: every problem found, at least one.
        line, column: of the first problem; None where the policy did not come from a text.
    """

    def __init__(self, file: str, problems: Iterable[Problem]) -> None:
        self.file = file
        self.problems = sorted(problems, key=lambda p: (p.file or "", p.line or 0, p.column or 0))
        self.line, self.column = self.problems[0][:2]
        lines = [_prefix(p.file or file, p) + p.message for p in self.problems[:MAX_SHOWN]]
        if len(self.problems) > MAX_SHOWN:
            lines.append(f"{file}: and {len(self.problems) - MAX_SHOWN} more")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self.problems)


def _prefix(file: str, problem: Problem) -> str:
    return f"{file}:{problem.line}:{problem.column}: " if problem.line else f"{file}: "


def nearest(name: object, valid: Iterable[str]) -> str:
    """'; did you mean "x"?' where a valid name is close to the one found, else nothing."""
    close = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def listed(names: Iterable[str]) -> str:
    """Names for a message: a, b, c."""
    return ", ".join(names)


def either(names: Sequence[str]) -> str:
    """Names for a message: a, b or c."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def shown(value: object) -> str:
    """A value as its author wrote it, cut to fit a line."""
    text = " ".join(_yaml(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def _yaml(value: object) -> str:
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case dict():
            return "{" + ", ".join(f"{k}: {_yaml(v)}" for k, v in value.items()) + "}"
        case list() | tuple():
            return "[" + ", ".join(map(_yaml, value)) + "]"
        case _:
            return str(value)
