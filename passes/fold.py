"""[B, H, N, D] from axes in any order, batch and heads in one axis or in two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fpsc.passes.axes import RESHAPES, origin_of, permutation
from fpsc.passes.edit import Sketch
from fpsc.passes.graph import CASTS, plain_name, shape
from fpsc.passes.masks import dtype_of
from fpsc.passes.products import Unreadable


@dataclass(frozen=True)
class Fold:
    """How [B, H] are found: `heads` of a folded axis; `swapped` where heads come first."""

    heads: int = 1
    swapped: bool = False


def find_fold(query: fx.Node, letters: str, batch: list[str]) -> Fold:
    """Where batch and heads are among the axes `batch` of the queries.

    Raises:
        Unreadable: they are in one axis, and what made it does not say how.
    """
    axes = [letters.index(c) for c in batch]
    origins = [origin_of(query, axis) for axis in axes]
    if len(axes) == 2:
        kinds = [o.kind if o is not None else "" for o in origins]
        swapped = kinds[0] == "heads" and kinds[1] != "heads"
        count = (shape(query) or [])[axes[0 if swapped else 1]]
        return Fold(count if isinstance(count, int) else 0, swapped)
    origin = origins[0]
    unknown = Unreadable("batch and heads are in one axis, and it cannot be told how")
    if origin is None:
        raise unknown
    if origin.kind == "origin":
        return Fold(1)
    if origin.kind == "heads":  # a batch of one, that is gone
        size = (shape(query) or [])[axes[0]]
        return Fold(size if isinstance(size, int) else 0)
    if origin.kind == "regrouped":
        return Fold(int(origin.heads))  # type: ignore[call-overload]
    if origin.kind != "merged":
        raise unknown
    sizes = shape(origin.node)
    assert sizes is not None
    kinds = [o.kind if (o := origin_of(origin.node, a)) else "" for a in origin.axes]
    heads = [a for a, kind in zip(origin.axes, kinds, strict=True) if kind == "heads"]
    if len(heads) != 1 or not isinstance(sizes[heads[0]], int):
        raise unknown
    if heads[0] == origin.axes[-1]:
        return Fold(int(sizes[heads[0]]))  # type: ignore[call-overload]
    if heads[0] == origin.axes[0]:
        return Fold(int(sizes[heads[0]]), swapped=True)  # type: ignore[call-overload]
    raise unknown


def arrange(sketch: Sketch, node: fx.Node, letters: str, order: list[str], fold: Fold) -> fx.Node:
    """A tensor as [B, H, N, D], from axes named by `letters`."""
    if sorted(letters) != sorted(order):
        raise Unreadable(f"axes {letters}, expected {''.join(order)}")
    node = permuted(sketch, node, [letters.index(c) for c in order])
    if len(order) == 3:
        if fold.heads == 0:
            raise Unreadable("the number of heads is not a number")
        if fold.heads == 1:
            return sketch.call("unsqueeze", node, 1)
        sizes = (fold.heads, -1) if fold.swapped else (-1, fold.heads)
        node = sketch.call("unflatten", node, 0, sizes)
    return sketch.call("transpose", node, 0, 1) if fold.swapped else node


def permuted(sketch: Sketch, node: fx.Node, order: list[int]) -> fx.Node:
    """A node with its axes in this order; itself where they are."""
    return node if order == sorted(order) else sketch.call("permute", node, *order)


def one_dtype(sketch: Sketch, *nodes: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """All in one dtype. Under autocast a product casts by itself; else the widest loses nothing."""
    dtypes = [dtype_of(n) for n in nodes]
    widest = dtypes[0]
    for other in dtypes[1:]:
        widest = torch.promote_types(widest, other)
    target = widest
    if len(set(dtypes)) > 1 and dtype_of(sketch.before) in dtypes and _narrow(nodes, sketch.before):
        target = dtype_of(sketch.before)
    q, k, v = (n if dtype_of(n) == target else sketch.call("to", n, target) for n in nodes)
    return q, k, v


def _narrow(nodes: tuple[fx.Node, ...], out: fx.Node) -> bool:
    """Whether queries and keys have no more digits than the output's dtype holds."""
    target = dtype_of(out)
    for node in nodes:
        current: fx.Node = node
        while dtype_of(current) != target:
            if plain_name(current) not in (*CASTS, *RESHAPES) and permutation(current) is None:
                return False
            if not current.all_input_nodes:
                return False
            current = current.all_input_nodes[0]
    return True
