"""Linear attention, q (k^T v): it has no scores to leave out, and is named for the report."""

from __future__ import annotations

from torch import fx

from fpsc.passes.axes import RESHAPES, permutation
from fpsc.passes.calls import AttentionCall
from fpsc.passes.edit import unsupported
from fpsc.passes.graph import is_linear, op_name, same, shape
from fpsc.passes.products import PRODUCTS, Unreadable, read_product

_FEATURES = frozenset(
    ["relu", "relu_", "elu", "softmax", "exp", "gelu", "silu", "sigmoid", "square"]
)
_NEUTRAL = frozenset(["to", "float", "contiguous", "pad", "mul", "truediv", "div", "type_as"])


def read_linear(node: fx.Node) -> AttentionCall | None:
    """The linear attention whose second product a node is; None where it is none."""
    if op_name(node) not in PRODUCTS:
        return None
    try:
        outer = read_product(node)
        inner_node = next(
            (n for n in map(_behind, (outer.a, outer.b)) if op_name(n) in PRODUCTS), None
        )
        if inner_node is None:
            return None
        inner = read_product(inner_node)
    except Unreadable:
        return None
    if not _sums_over_tokens(inner.node, inner.a, inner.b):
        return None
    if not any(_has_feature_map(n) for n in (outer.a, outer.b, inner.a, inner.b)):
        return None
    return unsupported(
        node,
        "linear attention",
        "linear attention, q (k^T v): there are no scores to leave out; it is left as it is",
    )


def _behind(node: fx.Node) -> fx.Node:
    """What a node is a cast, a scaling or a view of."""
    while node.all_input_nodes and (
        op_name(node) in _NEUTRAL or op_name(node) in RESHAPES or permutation(node) is not None
    ):
        node = node.all_input_nodes[0]
    return node


def _sums_over_tokens(node: fx.Node, a: fx.Node, b: fx.Node) -> bool:
    """Whether the result has no axis of the tokens: it is smaller than what was multiplied."""
    sizes = [shape(n) for n in (node, a, b)]
    if any(s is None for s in sizes):
        return False
    out, first, second = sizes
    assert out is not None and first is not None and second is not None
    tokens = [s for s in first[-2:] if any(same(s, t) for t in second[-2:])]
    return any(not any(same(s, t) for t in out[-2:]) for s in tokens)


def _has_feature_map(node: fx.Node) -> bool:
    for _ in range(8):
        if op_name(node) in _FEATURES:
            return True
        if is_linear(node) or not node.all_input_nodes or op_name(node) in PRODUCTS:
            return False
        node = node.all_input_nodes[0]
    return False
