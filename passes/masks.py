"""Masks: which of them only say what keys take part, in whatever shape and dtype.

A mask that is added to the scores says it where all numbers that it can hold are 0 or so low that
a softmax gives such a key nothing. What numbers a tensor can hold is read from the operations that
make it; a tensor that is an input of the graph can hold any.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable

import torch
from torch import fx

from fpsc.passes.axes import RESHAPES
from fpsc.passes.edit import Sketch
from fpsc.passes.graph import (
    CASTS,
    argument,
    dim,
    example,
    is_cat,
    op_name,
    plain_name,
    same,
    shape,
    writers_of,
)

LOW = -1e4
"""A bias of this or less takes a key out of a softmax, as -inf does."""
_MOST = 4  # numbers that are followed at once
_KEEPS = (
    CASTS | RESHAPES | frozenset(
        ["unsqueeze", "squeeze", "expand", "expand_as", "broadcast_to", "repeat", "permute",
         "repeat_interleave", "transpose", "getitem", "detach", "movedim", "view_as"]
    )
)  # fmt: skip
"""Calls whose result holds no number that their first argument does not hold."""
_ELEMENTWISE = frozenset(
    ["bool", "logical_not", "invert", "bitwise_not", "ne", "eq", "gt", "ge", "lt", "le"]
)
_FILLS = {"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0}
_FILLS |= {"ones": 1.0, "ones_like": 1.0, "new_ones": 1.0}
_ARITHMETIC: dict[str, Callable[[float, float], float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "rsub": lambda a, b: b - a,
    "mul": operator.mul,
    "div": operator.truediv,
}
_EXACT = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32)

Values = frozenset[float]


def dtype_of(node: fx.Node) -> torch.dtype:
    value = example(node)
    assert isinstance(value, torch.Tensor)
    return value.dtype


def number_of(value: object) -> float | None:
    """A number, whether it stands in the graph as one or as a constant tensor."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, fx.Node) and op_name(value) in ("tensor", "scalar_tensor") and value.args:
        if writers_of(value) or isinstance(value.args[0], fx.Node):
            return None
        return number_of(value.args[0])
    return None


def values_of(node: object, before: fx.Node) -> Values:
    """All numbers that a tensor can hold, whatever the inputs are; none where that is not known.

    Args:
        before: the node that reads it: what writes into it in place must come first.
    """
    number = number_of(node)
    if number is not None:
        return frozenset([number])
    tensor = example(node)
    if not isinstance(node, fx.Node) or not isinstance(tensor, torch.Tensor):
        return frozenset()
    if tensor.dtype == torch.bool:
        return frozenset([0.0, 1.0])
    if tensor.dtype not in _EXACT:
        return frozenset()
    writers = [w for w in writers_of(node) if w is not before]
    if len(writers) == 1 and writers[0] < before and writers[0].args[:1] == (node,):
        return values_after(writers[0])
    return frozenset() if writers else values_after(node)


def values_after(node: fx.Node) -> Values:
    """Numbers that a call can yield, rounded to its dtype."""

    def values(argument: object) -> Values:
        return values_of(argument, node)

    if not isinstance(example(node), torch.Tensor):
        return frozenset()
    name, dtype = plain_name(node), dtype_of(node)
    found: list[float] = []
    if name in _FILLS:
        found = [_FILLS[name]]
    elif name in ("full", "new_full", "full_like"):
        found = [*values(argument(node, 2 if name == "new_full" else 1, "fill_value"))]
    elif name in _KEEPS and node.args:
        inner = values(node.args[0])
        safe = dtype.is_floating_point or all(v.is_integer() for v in inner)
        if safe and (name in CASTS or (inner and dtype == dtype_of(node.args[0]))):  # type: ignore[arg-type]
            found = [*inner]
    elif is_cat(node):
        parts = argument(node, 0, "tensors")
        if isinstance(parts, list | tuple):
            found = _any_of(*(values(part) for part in parts))
    elif name == "masked_fill":
        found = _any_of(values(node.args[0]), values(argument(node, 2, "value")))
    elif name == "where":
        one, other = (1, 2) if node.op == "call_function" else (0, 2)
        found = _any_of(
            values(argument(node, one, "input")), values(argument(node, other, "other"))
        )
    elif name == "neg":
        found = [-v for v in values(node.args[0])]
    elif name in _ARITHMETIC and len(node.args) == 2 and not node.kwargs:
        left, right = (values(a) for a in node.args)
        if name != "div" or 0.0 not in right:
            found = [_ARITHMETIC[name](a, b) for a in left for b in right]
    if not dtype.is_floating_point and any(abs(v) >= 2**31 for v in found):
        return frozenset()
    rounded = {float(torch.tensor(v, dtype=torch.float64).to(dtype)) for v in found}
    known = len(rounded) <= _MOST and not any(map(math.isnan, rounded))
    return frozenset(rounded) if known else frozenset()


def _any_of(*values: Values) -> list[float]:
    return [v for each in values for v in each] if all(values) else []


def lowest(bias: fx.Node, before: fx.Node) -> float | None:
    """The largest of the low numbers that a bias of zeros and low numbers holds.

    None where it may hold others.
    """
    values = values_of(bias, before)
    low = values - {0.0}
    return max(low) if 0.0 in values and low and max(low) <= LOW else None


def keys_that_take_part(sketch: Sketch, bias: fx.Node, factor: float = 1.0) -> fx.Node | None:
    """The boolean mask that a bias of zeros and low numbers means; None if it is none.

    Args:
        factor: what the bias is multiplied by before the softmax.
    """
    low = lowest(bias, sketch.before)
    if low is None or low * factor > LOW:
        return None
    rank = len(shape(bias) or ())
    if rank == 4 and all(is_repeated(bias, axis) for axis in (1, 2)):
        one = slice(0, 1)
        bias = sketch.item(bias, (slice(None), one, one))
    return sketch.call(torch.gt, bias, low / 2)


def is_repeated(mask: fx.Node, axis: int) -> bool:
    """Whether all entries of a mask along an axis (1 or 2 of four) are the same."""
    value, sizes = example(mask), shape(mask)
    assert isinstance(value, torch.Tensor) and sizes is not None
    if same(sizes[axis], 1) or value.stride(axis) == 0:
        return True
    if not mask.all_input_nodes or writers_of(mask):
        return False
    source = mask.all_input_nodes[0]
    name, inner = plain_name(mask), shape(source)
    if inner is None:
        return False
    if name in ("repeat", "expand", "broadcast_to", "expand_as"):
        return len(inner) == len(sizes) and same(inner[axis], 1)
    if is_cat(mask):
        parts, along = argument(mask, 0, "tensors"), argument(mask, 1, "dim", 0)
        if not isinstance(parts, list | tuple) or along not in (-1, 3):
            return False
        return all(isinstance(p, fx.Node) and _rank4(p, axis) for p in parts)
    if name == "repeat_interleave":
        along = argument(mask, 2, "dim")
        return along == axis and same(inner[axis], 1)
    if name in ("view", "reshape", "unflatten") and axis == 1 and len(inner) == 3:
        # [B, 1, N], repeated to [B * H, 1, N], as [B, H, 1, N]
        repeats = argument(source, 1, "repeats")
        return (
            op_name(source) == "repeat_interleave"
            and argument(source, 2, "dim") == 0
            and isinstance(repeats, int)
            and same(repeats, sizes[1])
            and not writers_of(source)
        )
    if name in ("and_", "or_", "__and__", "__or__", "logical_and", "logical_or", "bitwise_and"):
        return all(
            isinstance(n, fx.Node) and (len(shape(n) or ()) < 4 - axis or _rank4(n, axis))
            for n in mask.args[:2]
        )
    if name in (
        *CASTS,
        "bool",
        "logical_not",
        "invert",
        "bitwise_not",
        "ne",
        "eq",
        "gt",
        "lt",
        "ge",
    ):
        return len(mask.all_input_nodes) == 1 and len(inner) == 4 and is_repeated(source, axis)
    return False


def _rank4(node: fx.Node, axis: int) -> bool:
    return len(shape(node) or ()) == 4 and is_repeated(node, axis)


def key_padding(mask: object) -> fx.Node | None:
    """The mask, if it is boolean, has four axes and is equal for all heads and queries."""
    value = example(mask)
    if not isinstance(mask, fx.Node) or not isinstance(value, torch.Tensor):
        return None
    if value.dtype != torch.bool or value.ndim != 4:
        return None
    return mask if all(is_repeated(mask, axis) for axis in (1, 2)) else None


def outer_product(mask: object) -> fx.Node | None:
    """`padding` [B, 1, 1, N], where a mask is `p & p.transpose(2, 3)` with p its repetition.

    A query that is padding sees no key by such a mask, and SDPA yields zeros for it.
    """
    if not isinstance(mask, fx.Node):
        return None
    while op_name(mask) in ("bool", "to") and mask.all_input_nodes:
        if writers_of(mask):
            return None
        mask = mask.all_input_nodes[0]
    if op_name(mask) not in ("and_", "__and__", "logical_and", "bitwise_and", "mul"):
        return None
    if len(mask.all_input_nodes) != 2 or writers_of(mask):
        return None
    first, second = mask.all_input_nodes
    for repeated, turned in ((first, second), (second, first)):
        axes = sorted(a % 4 for a in turned.args[1:] if isinstance(a, int))
        if op_name(turned) != "transpose" or turned.args[0] is not repeated or axes != [2, 3]:
            continue
        source = repeated.args[0] if repeated.args else None
        if op_name(repeated) not in ("repeat", "expand") or not isinstance(source, fx.Node):
            continue
        sizes, value = shape(source), example(source)
        if sizes is None or len(sizes) != 4 or not (same(sizes[1], 1) and same(sizes[2], 1)):
            continue
        long = same(sizes[3], (shape(mask) or [0])[-1])
        settled = not writers_of(repeated) and all(w < repeated for w in writers_of(source))
        if long and settled and isinstance(value, torch.Tensor) and value.dtype == torch.bool:
            return source
    return None


def mask_problem(mask: object) -> str:
    """Why a mask is not key padding."""
    value = example(mask)
    if not isinstance(value, torch.Tensor):
        return f"mask of unknown kind: {mask}"
    if value.dtype != torch.bool:
        return (
            f"additive mask of {value.dtype}, of which the graph does not show that it holds only "
            f"0 and numbers of {LOW:g} or less; pass the mask of the keys as bool"
        )
    return (
        f"mask of shape {[dim(s) for s in value.shape]}; expected key padding, [batch, 1, 1, "
        "tokens], equal for all heads and queries"
    )
