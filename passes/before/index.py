"""Python's indices, with an item for every axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import fx

from fpsc.passes.before.declined import Declined, require
from fpsc.passes.graph import Dim, dim, example, same, spelled_out


class Span(NamedTuple):
    """A slice with its bounds as positions."""

    start: Dim
    stop: Dim
    step: int = 1

    def is_all(self, size: Dim) -> bool:
        return self.step == 1 and same(self.start, 0) and same(self.stop, size)


Item = int | Span | None
"""What `x[...]` has for an axis; None makes a new one."""


def items_of(index: object, sizes: Sequence[Dim], canonical: Callable[[Dim], Dim]) -> list[Item]:
    """An index into a tensor of these sizes.

    Args:
        canonical: one expression for all sizes that are equal.
    """

    def position(value: object, default: Dim, size: Dim) -> Dim:
        found = example(value) if isinstance(value, fx.Node) else value
        if found is None:
            return default
        if not isinstance(found, int | torch.SymInt):
            raise Declined("a slice with bounds that are data")
        bound = canonical(dim(found))
        if isinstance(bound, int):
            negative = bound < 0
        else:
            negative = all(c < 0 for c in bound.as_coefficients_dict().values())
        bound = canonical(size + bound) if negative else bound
        return min(bound, size) if isinstance(bound, int) and isinstance(size, int) else bound

    found: list[Item] = []
    axis = 0
    for item in spelled_out(index, len(sizes)):
        if isinstance(item, slice):
            size, step = sizes[axis], item.step or 1
            require(isinstance(step, int), "a slice with steps")
            found.append(Span(position(item.start, 0, size), position(item.stop, size, size), step))
        elif item is None or isinstance(item, int):
            found.append(item)
        else:
            raise Declined("an index that is data")
        axis += item is not None
    return found
