"""`fpsc::plan`: the lists of a sequence whose length only the running graph knows.

    fpsc::plan(span, prefix, suffix, tokens, device)
        -> (list_ptr, list_idx, back_ptr, back_idx, order, groups, gather, valid)

Where text is cut to its real length inside a model, no list can be laid out before the graph runs.
When it runs, the length is a number on the host: the graph waited for it. So the lists are looked
up there, of the model that `span` names.

    span    int64 [4] on the CPU: number of a planner, and the grid (T, Y, X)

It is an input of the graph, because compiled graphs are shared between models.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fpsc.grid import BLOCK

Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Planner(Protocol):
    """What lays lists out, for one model."""

    def lists(
        self, grid: tuple[int, int, int], prefix: int, suffix: int, device: torch.device
    ) -> Sequence[Tensor]:
        """The tables of `fpsc::attention` from `list_ptr` on, for a span of video."""


_planners: weakref.WeakValueDictionary[int, Planner] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def register(planner: Planner) -> int:
    """A number for a planner, for as long as it lives."""
    number = next(_numbers)
    _planners[number] = planner
    return number


@torch.library.custom_op("fpsc::plan", mutates_args=())
def plan(span: Tensor, prefix: int, suffix: int, tokens: int, device: torch.device) -> Lists:
    """The lists of a span of video with `prefix` and `suffix` text tokens around it.

    Args:
        span: see the module.
        tokens: of the sequence, to check that the span is the right one.

    Raises:
        ValueError: the span has another number of tokens than the sequence.
        RuntimeError: the model is gone.
    """
    number, t, y, x = span.tolist()
    if prefix + t * y * x + suffix != tokens:
        raise ValueError(
            f"fpsattn: grid {[t, y, x]} with {prefix} + {suffix} text tokens makes "
            f"{prefix + t * y * x + suffix} tokens, and this attention has {tokens}; state the "
            'right one with options={"grid": [T, Y, X]}'
        )
    planner = _planners.get(number)
    if planner is None:
        raise RuntimeError("fpsattn: the model that this graph was called for no longer exists")
    held = planner.lists((t, y, x), prefix, suffix, device)
    # Copies: what an op returns belongs to the graph, which may write to it.
    return tuple(x.clone() for x in held)  # type: ignore[return-value]


@plan.register_fake
def _(span: Tensor, prefix: int, suffix: int, tokens: int, device: torch.device) -> Lists:
    new = torch.library.get_ctx().new_dynamic_size
    patterns, groupings, tiles, entries = new(), new(), new(), new()
    sizes = (
        (patterns, tiles + 1), (entries,), (patterns, tiles + 1), (entries,),
        (patterns, tiles), (groupings, tiles), (tiles, BLOCK), (tiles,),
    )  # fmt: skip
    return tuple(torch.empty(s, dtype=torch.int32, device=device) for s in sizes)  # type: ignore[return-value]
