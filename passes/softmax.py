"""Attention that is written out as softmax(q k^T) v, in whatever letters, layout and order.

Both products are read as an einsum of two operands. The letters then say everything: what the
first one contracts is head_dim, the axis of the softmax is the keys', what the second one contracts
must be that axis. Between them only what a softmax of scaled scores allows may happen; everything
else leaves the attention as it is, with the reason.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import fx

from fpsc.passes.calls import AttentionCall
from fpsc.passes.edit import Sketch, unsupported
from fpsc.passes.fold import Fold, arrange, find_fold, one_dtype, permuted
from fpsc.passes.graph import Dim, argument, op_name, plain_name, same, shape
from fpsc.passes.masks import LOW, dtype_of, keys_that_take_part
from fpsc.passes.products import PRODUCTS, Product, Unreadable, outer_letters, read_product
from fpsc.passes.scores import Scores, after_step, step

SPELLING = "softmax(q k^T) v"
FIX = "call torch.nn.functional.scaled_dot_product_attention in the model"


def is_softmax(node: fx.Node) -> bool:
    if op_name(node) in ("softmax", "_softmax"):
        return True
    return _exponentials(node) is not None


def _exponentials(node: fx.Node) -> fx.Node | None:
    """exp(x) of a node that is exp(x) / exp(x).sum(dim, keepdim=True)."""
    if plain_name(node) != "div" or len(node.args) < 2:
        return None
    top, bottom = node.args[:2]
    if not isinstance(top, fx.Node) or not isinstance(bottom, fx.Node):
        return None
    if op_name(top) != "exp" or op_name(bottom) != "sum" or bottom.args[:1] != (top,):
        return None
    return top if argument(bottom, 2, "keepdim", False) else None


def read_softmax(node: fx.Node) -> AttentionCall | None:
    """The attention around a softmax; None where the softmax is of something else."""
    start = _exponentials(node) or node
    path = _path_back(start.all_input_nodes[0]) if start.all_input_nodes else None
    if path is None or not _feeds_product(node):
        return None
    try:
        return _read(node, start, path)
    except Unreadable as reason:
        return unsupported(
            node, SPELLING, f"attention is written out as {SPELLING}: {reason}; {FIX}"
        )


def _path_back(node: fx.Node, depth: int = 24) -> list[fx.Node] | None:
    """Nodes from a product to `node`."""
    if op_name(node) in PRODUCTS:
        return [node]
    if depth == 0 or node.op not in ("call_function", "call_method"):
        return None
    sizes = shape(node)
    for source in node.all_input_nodes:
        inner = shape(source)
        if inner is None or sizes is None or not _same_count(inner, sizes):
            continue
        path = _path_back(source, depth - 1)
        if path is not None:
            return [*path, node]
    return None


def _same_count(a: list[Dim], b: list[Dim]) -> bool:
    return same(math.prod(a), math.prod(b))  # type: ignore[arg-type]


def _feeds_product(node: fx.Node) -> bool:
    seen, queue = {node}, [node]
    for current in queue:
        for user in current.users:
            if op_name(user) in PRODUCTS:
                return True
            if user not in seen and len(seen) < 32:
                seen.add(user)
                queue.append(user)
    return False


def _read(node: fx.Node, start: fx.Node, path: list[fx.Node]) -> AttentionCall:
    first = read_product(path[0])
    contracted, letter_i, letter_j = outer_letters(first)
    batch = [c for c in first.letters[2] if c not in (letter_i, letter_j)]
    names = {"bh": ("b", "h"), "p": ("p",)}["bh" if len(batch) == 2 else "p"]
    role = {**dict(zip(batch, names, strict=True)), letter_i: "i", letter_j: "j"}
    scores = Scores(tuple(role[c] for c in first.letters[2]), first.scale)
    if first.bias is not None:
        scores.masks.append((first.bias, None, 0.0, 1.0, scores.roles))
    for before, current in pairwise(path):
        step(scores, before, current)
    dim = argument(node if start is node else node.args[1], 1, "dim")  # type: ignore[arg-type]
    if isinstance(dim, list | tuple) and len(dim) == 1:
        dim = dim[0]
    if not isinstance(dim, int):
        raise Unreadable(f"softmax over the axis {dim}")
    axis = scores.roles[dim]
    if axis not in ("i", "j"):
        raise Unreadable("softmax over batch or heads")
    if axis == "i":  # the scores are transposed
        if scores.shifted:
            raise Unreadable("a tensor is subtracted from the scores")
        swap = {"i": "j", "j": "i"}
        scores.roles = tuple(swap.get(r, r) for r in scores.roles)
        scores.masks = [(*m[:4], tuple(swap.get(r, r) for r in m[4])) for m in scores.masks]
        letter_i, letter_j = letter_j, letter_i
    path = [*path, start] if start is node else [*path, start, node]
    if start is not node:
        scores.side.add(node.args[1])  # type: ignore[arg-type]
    side = set(scores.side)
    current = node
    while True:
        users = list(current.users)
        if len(users) != 1:
            raise Unreadable("the attention weights are used elsewhere too")
        following = users[0]
        if op_name(following) in PRODUCTS:
            break
        after_step(scores, current, following)
        path.append(following)
        current = following
    second = read_product(following)
    _check_users(path, side, following)
    return _sketch(scores, first, second, current, (contracted, letter_i, letter_j), batch)


def _check_users(path: list[fx.Node], side: set[fx.Node], last: fx.Node) -> None:
    """Nobody else may read, or write in place, what is between the products."""
    known = {*path, *side, last}
    for node in (*path, *side):
        if any(user not in known for user in node.users):
            raise Unreadable(f"{node.name} on the way to the attention weights is used elsewhere")


def _sketch(
    scores: Scores,
    first: Product,
    second: Product,
    weights: fx.Node,
    letters: tuple[str, str, str],
    batch: list[str],
) -> AttentionCall:
    """Insert the SDPA call."""
    contracted, letter_i, letter_j = letters
    p_letters = second.letters[0] if second.a is weights else second.letters[1]
    v_letters = second.letters[1] if second.a is weights else second.letters[0]
    values = second.b if second.a is weights else second.a
    if second.a is second.b or second.bias is not None or second.scale != 1.0:
        raise Unreadable("the product with the values has more than two operands")
    role = dict(zip(scores.roles, p_letters, strict=True))
    into, of_a, of_b = outer_letters(second)
    feature = of_b if second.a is weights else of_a
    if into != role["j"] or (of_a if second.a is weights else of_b) != role["i"]:
        raise Unreadable("the product with the values does not sum over the keys")
    second_batch = [role[r] for r in scores.roles if r in "bhp"]
    query, key = first.a, first.b
    q_letters, k_letters = first.letters[:2]
    if letter_i not in q_letters:
        query, key, q_letters, k_letters = key, query, k_letters, q_letters
    fold = find_fold(query, q_letters, batch)
    sketch = Sketch(second.node)
    q = arrange(sketch, query, q_letters, [*batch, letter_i, contracted], fold)
    k = arrange(sketch, key, k_letters, [*batch, letter_j, contracted], fold)
    v = arrange(sketch, values, v_letters, [*second_batch, into, feature], fold)
    q, k, v = one_dtype(sketch, q, k, v)
    mask = _mask(sketch, scores, fold)

    def restore(node: fx.Node) -> fx.Node:
        if fold.swapped:
            node = sketch.call("transpose", node, 0, 1)
        if len(second_batch) == 1:
            node = sketch.call("flatten", node, 0, 1)
        order = [*second_batch, role["i"], feature]
        return permuted(sketch, node, [order.index(c) for c in second.letters[2]])

    return sketch.attention(
        second.node,
        SPELLING,
        (q, k, v),
        restore,
        mask=mask,
        dropout=scores.dropout,
        scale=scores.scale,
    )


def _mask(sketch: Sketch, scores: Scores, fold: Fold) -> fx.Node | None:
    result: fx.Node | None = None
    for node, takes_part, fill, at, roles in scores.masks:
        later = scores.scale / at
        if takes_part is not None and fill * later > LOW:
            raise Unreadable(f"a mask that fills with {fill}")
        if takes_part is None:
            boolean = keys_that_take_part(sketch, node, later)
            if boolean is not None:
                node = boolean
            elif later != 1.0:
                node = sketch.call("mul", node, later)
        if dtype_of(node) == torch.uint8:
            node = sketch.call("to", node, torch.bool)
        if takes_part is False:
            node = sketch.call(torch.logical_not, node)
        sizes = shape(node) or []
        if len(sizes) > len(roles):
            raise Unreadable(f"a mask of shape {sizes}")
        for _ in range(len(roles) - len(sizes)):
            node = sketch.call("unsqueeze", node, 0)
        sizes = shape(node) or []
        if fold.swapped or ("p" in roles and not same(sizes[roles.index("p")], 1)):
            raise Unreadable(f"a mask of shape {sizes} over batch and heads in one axis")
        if "p" in roles:
            node = sketch.call("unsqueeze", node, 0)
            roles = ("b", "h", *(r for r in roles if r != "p"))
            if scores.roles and roles[2:] not in (("i", "j"), ("j", "i")):
                raise Unreadable("a mask whose axes are permuted")
        node = permuted(sketch, node, [roles.index(r) for r in "bhij"])
        if same((shape(node) or [1])[-1], 1):
            raise Unreadable("a mask that is the same for all keys")
        if result is None:
            result = node
        elif dtype_of(result) == dtype_of(node) == torch.bool:
            result = sketch.call(torch.logical_and, result, node)
        else:
            raise Unreadable("several masks that are added to the scores")
    return result
