"""How a measurement says where it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Tell(Protocol):
    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        """What is going on now; `done` of `total` parts, where they can be counted."""


def quiet(what: str, done: int = 0, total: int = 0) -> None:
    """To nobody."""
