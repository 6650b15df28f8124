"""Where an axis of a tensor comes from: batch and heads are told apart by what made them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fpsc.passes.graph import (
    Dim,
    argument,
    example,
    is_convolution,
    is_linear,
    op_name,
    same,
    shape,
    spelled_out,
)

RESHAPES = frozenset(["view", "reshape", "flatten", "unflatten", "_unsafe_view"])
_LIMIT = 100


@dataclass(frozen=True)
class Origin:
    """What made an axis.

    Attributes:
        kind: `origin` (a projection or an input has it), `heads` (split off the features),
            `merged` (of `axes` of `node`), `regrouped` (batch and features became batch * heads and
            head_dim).
        heads: number of heads of a regrouped axis.
    """

    kind: str
    node: fx.Node
    axes: tuple[int, ...] = ()
    heads: Dim = 1


def permutation(node: fx.Node) -> list[int] | None:
    """Which axis of its input each axis of a permuting node is; None for other nodes."""
    name, sizes = op_name(node), shape(node)
    if sizes is None or not node.args:
        return None
    rank = len(sizes)
    order = list(range(rank))
    if name in ("transpose", "swapaxes", "swapdims"):
        first, second = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    elif name == "t" and rank == 2:
        first, second = 0, 1
    elif name in ("getattr", "adjoint") and (name == "adjoint" or node.args[1:] in (("mT",),)):
        first, second = -2, -1
    elif name == "permute":
        dims = (
            node.args[1] if isinstance(argument(node, 1, "dims"), list | tuple) else node.args[1:]
        )
        if "dims" in node.kwargs:
            dims = node.kwargs["dims"]
        if not isinstance(dims, list | tuple) or not all(isinstance(d, int) for d in dims):
            return None
        return [int(d) % rank for d in dims]  # type: ignore[arg-type, call-overload]
    else:
        return None
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    order[first], order[second] = order[second], order[first]
    return order


def regions(before: list[Dim], after: list[Dim]) -> list[tuple[list[int], list[int]]] | None:
    """The smallest groups of neighbouring axes that a reshape maps onto each other."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left: list[int] = []
        right: list[int] = []
        a: Dim = 1
        b: Dim = 1
        while not left or not right or not same(a, b):
            take_left = i < len(before) and (not left or _less(a, b) or j == len(after))
            if take_left:
                a = a * before[i]
                left.append(i)
                i += 1
            elif j < len(after):
                b = b * after[j]
                right.append(j)
                j += 1
            else:
                # trailing axes of size 1
                return found if same(a, b) or same(a, 1) else None
        found.append((left, right))
    return found


def _less(a: Dim, b: Dim) -> bool:
    try:
        return bool(a < b)
    except TypeError:  # symbols: whatever divides the other is the smaller
        import sympy

        return not sympy.simplify(sympy.sympify(a) / b).is_polynomial()


def origin_of(node: fx.Node, axis: int) -> Origin | None:
    """What made an axis of a node's value; None where that cannot be told."""
    for _ in range(_LIMIT):
        if is_linear(node) or is_convolution(node) or node.op == "placeholder":
            return Origin("origin", node, (axis,))
        sizes = shape(node)
        if sizes is None or not node.all_input_nodes:
            return None
        name, source = op_name(node), node.all_input_nodes[0]
        inner = shape(source)
        order = permutation(node)
        if order is not None:
            node, axis = source, order[axis]
        elif name in RESHAPES and inner is not None:
            groups = regions(inner, sizes)
            group = next((g for g in groups or () if axis in g[1]), None)
            if group is None:
                return None
            left, right = group
            if len(left) == len(right) == 1:
                node, axis = source, left[0]
            elif len(left) == 1:
                last = left[0] == len(inner) - 1
                return Origin("heads", node, (axis,)) if last and axis != right[-1] else None
            elif len(right) == 1:
                return Origin("merged", source, tuple(left))
            elif len(left) == 2 and len(right) == 2 and axis == right[0]:
                # (batch, features) -> (batch * heads, head_dim)
                heads = _quotient(sizes[axis], inner[left[0]])
                return Origin("regrouped", node, (axis,), heads) if heads else None
            else:
                return None
        elif name == "getitem":
            step = _through_getitem(node, source, axis)
            if step is None:
                return None
            node, axis = step
        elif name == "stack":
            new = argument(node, 1, "dim", 0)
            if not isinstance(new, int) or axis == new % len(sizes):
                return None
            node, axis = source, axis - (axis > new % len(sizes))
        elif name in ("view_as_real", "view_as_complex"):
            node = source
        elif name == "unsqueeze":
            new = argument(node, 1, "dim")
            if not isinstance(new, int) or axis == new % len(sizes):
                return None
            node, axis = source, axis - (axis > new % len(sizes))
        else:
            same_rank = [n for n in node.all_input_nodes if _fits(shape(n), sizes, axis)]
            if not same_rank:
                return None
            node = same_rank[0]
    return None


def _fits(inner: list[Dim] | None, outer: list[Dim], axis: int) -> bool:
    return inner is not None and len(inner) == len(outer) and same(inner[axis], outer[axis])


def _quotient(a: Dim, b: Dim) -> int:
    import sympy

    value = sympy.simplify(sympy.sympify(a) / sympy.sympify(b))
    return int(value) if value.is_Integer else 0


def _through_getitem(node: fx.Node, source: fx.Node, axis: int) -> tuple[fx.Node, int] | None:
    """Before an index: of a tensor, or of what `chunk`, `split` and `unbind` yield."""
    index = node.args[1]
    if not isinstance(example(source), torch.Tensor):
        name = op_name(source)
        if name in ("chunk", "split", "split_with_sizes", "tensor_split"):
            return source.all_input_nodes[0], axis
        if name == "unbind":
            dim, sizes = argument(source, 1, "dim", 0), shape(source.all_input_nodes[0])
            if isinstance(dim, int) and sizes is not None:
                return source.all_input_nodes[0], axis + (axis >= dim % len(sizes))
        return None
    out = 0
    position = 0
    for item in spelled_out(index, len(shape(source) or ())):
        if item is None:
            if out == axis:
                return None
            out += 1
        elif isinstance(item, slice):
            if out == axis:
                return source, position
            out += 1
            position += 1
        elif isinstance(item, int):
            position += 1
        else:
            return None
    return None
