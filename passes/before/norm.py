"""Reading of norms over the last axis: torch's own, and RMSNorm written out."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import fx

from fpsc.kernels.before import LAYER, RMS
from fpsc.passes.graph import (
    CASTS,
    argument,
    example,
    fixed,
    memory_of,
    op_name,
    plain_name,
    same_sizes,
    shape,
    writers_of,
)


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis of a tensor.

    Attributes:
        x: what it normalises, behind casts that widen.
        kind: RMS or LAYER.
        width: length of the axis.
        weight, bias: [width] or None.
    """

    x: fx.Node
    kind: str
    epsilon: float
    width: int
    weight: fx.Node | None
    bias: fx.Node | None


_Found = tuple[str, object, object, object, object]
"""kind, x, epsilon, weight and bias of a norm, as they are written."""


def read_norm(node: fx.Node, carrying: Container[fx.Node]) -> Norm | None:
    """The norm whose result a node is; None where it is none that the op has.

    Args:
        carrying: what depends on queries or keys: no weights.
    """
    found, sizes = _called(node) or _weighted(node) or _scaled(node), shape(node)
    if found is None or not sizes or not isinstance(width := sizes[-1], int):
        return None
    kind, x, epsilon, *given = found
    epsilon = fixed(epsilon)
    if not isinstance(x, fx.Node) or not isinstance(epsilon, float) or epsilon <= 0:
        return None
    weight, bias = (p if isinstance(p, fx.Node) else None for p in given)
    for parameter in filter(None, (weight, bias)):
        fits = same_sizes(shape(parameter) or [], [width])
        if not fits or parameter in carrying or writers_of(memory_of(parameter)):
            return None
    return Norm(_behind_casts(x, widening=True), kind, epsilon, width, weight, bias)


def _called(node: fx.Node) -> _Found | None:
    """`rms_norm` and `layer_norm`."""
    name, x = op_name(node), argument(node, 0, "input")
    if name not in ("rms_norm", "layer_norm"):
        return None
    over, weight = argument(node, 1, "normalized_shape"), argument(node, 2, "weight")
    if not isinstance(over, list | tuple) or len(over) != 1:
        return None
    if name == "rms_norm":
        return RMS, x, argument(node, 3, "eps"), weight, None
    return LAYER, x, argument(node, 4, "eps", 1e-5), weight, argument(node, 3, "bias")


def _weighted(node: fx.Node) -> _Found | None:
    """What `_scaled` reads, times a weight."""
    for x, weight in _factors(node):
        if isinstance(x, fx.Node) and len(shape(weight) or ()) == 1:
            scaled = _behind_casts(x)
            found = None if writers_of(scaled) else _scaled(scaled)
            if found is not None:
                return (*found[:3], weight, None)
    return None


def _scaled(node: fx.Node) -> _Found | None:
    """`x * rsqrt(mean(x ** 2, -1, keepdim=True) + epsilon)`, or divided by the square root."""
    divided = plain_name(node) == "div" and len(node.args) == 2 and not node.kwargs
    for x, root in [node.args] if divided else _factors(node):
        root = _behind_casts(root) if isinstance(root, fx.Node) else None
        if not isinstance(x, fx.Node) or root is None or not root.args:
            continue
        total = root.args[0]
        if op_name(root) != ("sqrt" if divided else "rsqrt") or not isinstance(total, fx.Node):
            continue
        if plain_name(total) != "add" or len(total.args) != 2 or total.kwargs:
            continue
        mean, epsilon = total.args if isinstance(total.args[0], fx.Node) else total.args[::-1]
        square = _averaged(mean)
        squared = None if square is None else _squared(square)
        if squared is None or _behind_casts(squared) is not _behind_casts(x):
            continue
        made = (square, mean, total, root)
        if all(w in made for n in made if isinstance(n, fx.Node) for w in writers_of(n)):
            return RMS, x, epsilon, None, None
    return None


def _factors(node: fx.Node) -> list[tuple[object, ...]]:
    """Both operands of a product, in both orders."""
    if plain_name(node) != "mul" or len(node.args) != 2 or node.kwargs:
        return []
    return [tuple(node.args), tuple(node.args[::-1])]


def _averaged(node: object) -> fx.Node | None:
    """x of `mean(x, -1, keepdim=True)`."""
    if not isinstance(node, fx.Node) or op_name(node) != "mean" or node.kwargs.get("dtype"):
        return None
    x, over = node.args[0], argument(node, 1, "dim")
    over = over[0] if isinstance(over, list | tuple) and len(over) == 1 else over
    last = over in (-1, len(shape(x) or ()) - 1)
    kept = argument(node, 2, "keepdim", False) is True
    return x if isinstance(x, fx.Node) and last and kept else None


def _squared(node: fx.Node) -> fx.Node | None:
    """x of `x ** 2`."""
    if not node.args:
        return None
    name, (x, *rest) = plain_name(node), node.args
    power = name == "pow" and rest in ([2], [2.0])
    found = power or name == "square" or (name == "mul" and rest == [x])
    return x if isinstance(x, fx.Node) and found else None


def _behind_casts(node: fx.Node, *, widening: bool = False) -> fx.Node:
    """What a node is but for casts, or but for those that lose nothing."""
    while op_name(node) in CASTS and node.args and isinstance(source := node.args[0], fx.Node):
        before, after = example(source), example(node)
        if widening and not (
            isinstance(before, torch.Tensor)
            and isinstance(after, torch.Tensor)
            and torch.promote_types(before.dtype, after.dtype) == after.dtype
        ):
            break
        node = source
    return node
