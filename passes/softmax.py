"""Attention that is written out as softmax(q k^T) v, in whatever letters, layout and order.

Both products are read as an einsum of two operands. The letters then say everything: what the
first one contracts is head_dim, the axis of the softmax is the keys', what the second one contracts
must be that axis. Between them only what a softmax of scaled scores allows may happen; everything
else leaves the attention as it is, with the reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import fx

from fpsc.passes.axes import RESHAPES, origin_of, permutation
from fpsc.passes.calls import AttentionCall
from fpsc.passes.edit import Sketch, unsupported
from fpsc.passes.graph import Dim, argument, example, op_name, same, shape

SPELLING = "softmax(q k^T) v"
FIX = "call torch.nn.functional.scaled_dot_product_attention in the model"
PRODUCTS = frozenset(["matmul", "bmm", "baddbmm", "einsum", "__matmul__", "imatmul"])
_CASTS = frozenset(
    ["to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone"]
)
_SIDE = frozenset(["amax", "max", "getitem", "detach", "getattr", "logsumexp", "unsqueeze"])
_NAMES = {
    "imul": "mul", "mul_": "mul", "multiply": "mul", "__mul__": "mul",
    "truediv": "div", "itruediv": "div", "div_": "div", "true_divide": "div",
    "iadd": "add", "add_": "add", "isub": "sub", "sub_": "sub", "subtract": "sub",
    "masked_fill_": "masked_fill", "dropout_": "dropout",
}  # fmt: skip
_LOW = -1e4
"""A fill of this or less takes a key out of a softmax, as -inf does."""


class Unreadable(Exception):
    """Why an attention that is written out cannot be rewritten."""


@dataclass(frozen=True)
class Product:
    """A product of two tensors as an einsum: letters of the operands and of the result."""

    node: fx.Node
    a: fx.Node
    b: fx.Node
    letters: tuple[str, str, str]
    scale: float = 1.0
    bias: fx.Node | None = None


@dataclass
class Scores:
    """What is known of the scores along the way to the softmax.

    Attributes:
        roles: of the axes, in order: `b`, `h` or `p` (batch and heads in one), `i`, `j`.
        masks: (node, whether True takes part or None for a bias, value of the fill, scale so far,
            roles at that place).
        side: nodes beside the way whose value does not matter.
        shifted: whether something that is constant along `j` only was added or subtracted.
    """

    roles: tuple[str, ...]
    scale: float = 1.0
    dropout: float = 0.0
    masks: list[tuple[fx.Node, bool | None, float, float, tuple[str, ...]]] = field(
        default_factory=list
    )
    side: set[fx.Node] = field(default_factory=set)
    shifted: bool = False


def short_name(node: fx.Node) -> str:
    name = op_name(node)
    return _NAMES.get(name, name)


def is_softmax(node: fx.Node) -> bool:
    if op_name(node) in ("softmax", "_softmax"):
        return True
    return _exponentials(node) is not None


def _exponentials(node: fx.Node) -> fx.Node | None:
    """exp(x) of a node that is exp(x) / exp(x).sum(dim, keepdim=True)."""
    if short_name(node) != "div" or len(node.args) < 2:
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
    contracted, letter_i, letter_j = _outer(first)
    batch = [c for c in first.letters[2] if c not in (letter_i, letter_j)]
    names = {"bh": ("b", "h"), "p": ("p",)}["bh" if len(batch) == 2 else "p"]
    role = {**dict(zip(batch, names, strict=True)), letter_i: "i", letter_j: "j"}
    scores = Scores(tuple(role[c] for c in first.letters[2]), first.scale)
    if first.bias is not None:
        scores.masks.append((first.bias, None, 0.0, 1.0, scores.roles))
    for before, current in pairwise(path):
        _step(scores, before, current)
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
        _after_step(scores, current, following)
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


def _step(scores: Scores, before: fx.Node, node: fx.Node) -> None:
    """What one node between the first product and the softmax does to the scores."""
    name = short_name(node)
    if _moved(scores, before, node) or name in _CASTS:
        return
    if name in ("mul", "div"):
        left = node.args[0] is before
        factor = number_of(node.args[1] if left else node.args[0])
        if factor is None or (name == "div" and not left) or factor <= 0:
            raise Unreadable("the scale of the scores is not a positive number")
        scores.scale = scores.scale * factor if name == "mul" else scores.scale / factor
    elif name in ("add", "sub"):
        other = node.args[1] if node.args[0] is before else node.args[0]
        if set(node.kwargs) - {"alpha"} or node.kwargs.get("alpha", 1) != 1:
            raise Unreadable(f"{name} with {dict(node.kwargs)}")
        if name == "sub" and node.args[0] is not before:
            raise Unreadable("the scores are subtracted from something")
        _added(scores, before, other, name)
    elif name == "masked_fill":
        _filled(scores, argument(node, 1, "mask"), argument(node, 2, "value"), takes_part=False)
    elif name == "where" and argument(node, 1, "input") is before:
        _filled(scores, argument(node, 0, "condition"), argument(node, 2, "other"), takes_part=True)
    elif name == "where" and node.op == "call_method" and node.args[0] is before:
        _filled(scores, node.args[1], argument(node, 2, "other"), takes_part=True)
    else:
        raise Unreadable(f"{op_name(node)} between the scores and the softmax")


def _added(scores: Scores, before: fx.Node, other: object, name: str) -> None:
    if not isinstance(other, fx.Node):
        return  # a number: a softmax is the same without it
    sizes = shape(other)
    place = scores.roles.index("j") - len(scores.roles)
    query = scores.roles.index("i") - len(scores.roles)
    if sizes is not None:
        constant = {a for a in (place, query) if len(sizes) < -a or same(sizes[a], 1)}
        if constant >= {place, query} or (place in constant and before in _sources(other)):
            scores.side |= _beside(other, before)
            scores.shifted |= not constant >= {place, query}
            return
    if name == "sub":
        raise Unreadable("a tensor is subtracted from the scores")
    scores.masks.append((other, None, 0.0, scores.scale, scores.roles))


def _sources(node: fx.Node) -> set[fx.Node]:
    seen, queue = {node}, [node]
    for current in queue:
        for source in current.all_input_nodes if short_name(current) in _SIDE else ():
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return seen


def _beside(node: fx.Node, path_node: fx.Node) -> set[fx.Node]:
    """`node` and what it is made of, up to the scores."""
    return {n for n in _sources(node) if short_name(n) in _SIDE and n is not path_node}


def _filled(scores: Scores, mask: object, value: object, *, takes_part: bool) -> None:
    fill = number_of(value)
    if not isinstance(mask, fx.Node) or fill is None:
        raise Unreadable("a mask that the graph does not show")
    scores.masks.append((mask, takes_part, fill, scores.scale, scores.roles))


def _moved(scores: Scores, before: fx.Node, node: fx.Node) -> bool:
    """Follow the axes through a view; False where a node is none."""
    order = permutation(node)
    if order is not None:
        scores.roles = tuple(scores.roles[i] for i in order)
        return True
    if short_name(node) not in RESHAPES:
        return False
    old, new = shape(before), shape(node)
    assert old is not None and new is not None
    if len(old) == len(new) and all(same(a, b) for a, b in zip(old, new, strict=True)):
        return True
    if len(old) == 3 and len(new) == 4 and _all_same(old[1:], new[2:]) and scores.roles[0] == "p":
        scores.roles = ("b", "h", *scores.roles[1:])
    elif len(old) == 4 and len(new) == 3 and _all_same(old[2:], new[1:]):
        if scores.roles[:2] != ("b", "h"):
            raise Unreadable("the scores are reshaped")
        scores.roles = ("p", *scores.roles[2:])
    else:
        raise Unreadable(f"the scores are reshaped from {old} to {new}")
    return True


def _all_same(a: list[Dim], b: list[Dim]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def _after_step(scores: Scores, before: fx.Node, node: fx.Node) -> None:
    """What one node between the softmax and the second product does to the weights."""
    name = short_name(node)
    if _moved(scores, before, node) or name in _CASTS:
        return
    if name != "dropout":
        raise Unreadable(f"{op_name(node)} between the softmax and the product with the values")
    chance, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
    if training and chance != 0:
        scores.dropout = float(chance) if isinstance(chance, int | float) else 1.0


def number_of(value: object) -> float | None:
    """A number, whether it stands in the graph as one or as a constant tensor."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, fx.Node) and op_name(value) in ("tensor", "scalar_tensor") and value.args:
        return number_of(value.args[0]) if not isinstance(value.args[0], fx.Node) else None
    return None


def read_product(node: fx.Node) -> Product:
    """A matrix product in any of its spellings."""
    name = op_name(node)
    if name == "einsum":
        return _read_einsum(node)
    scale, bias, at = 1.0, None, 0
    if name == "baddbmm":
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        if not isinstance(beta, int | float) or not isinstance(alpha, int | float) or alpha <= 0:
            raise Unreadable("alpha or beta of baddbmm is not a positive number")
        scale, at = float(alpha), 1
        if beta != 0:
            bias = node.args[0] if isinstance(node.args[0], fx.Node) else None
    names = (("batch1", "batch2") if name == "baddbmm" else ("mat2",) * 2) if at else None
    a = argument(node, at, names[0] if names else "input")
    b = argument(node, at + 1, names[1] if names else "mat2" if name == "bmm" else "other")
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        raise Unreadable(f"{name} of what the graph does not show")
    first, second = shape(a), shape(b)
    if first is None or second is None or len(first) != len(second) or len(first) not in (3, 4):
        raise Unreadable(f"{name} of tensors of shapes {first} and {second}")
    if not _all_same(first[:-2], second[:-2]):
        raise Unreadable(f"{name} broadcasts {first} and {second}")
    batch = "xy"[: len(first) - 2]
    return Product(node, a, b, (batch + "mk", batch + "kn", batch + "mn"), scale, bias)


def _read_einsum(node: fx.Node) -> Product:
    equation, operands = node.args[0], node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        raise Unreadable("einsum without -> or not of two operands")
    inputs, out = equation.replace(" ", "").split("->")
    a, b = operands
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or inputs.count(",") != 1:
        raise Unreadable(f"einsum {equation}")
    left, right = inputs.split(",")
    more = len(shape(a) or ()) - len(left.replace("...", ""))
    if more != len(shape(b) or ()) - len(right.replace("...", "")) or more not in (0, 1, 2):
        raise Unreadable(f"einsum {equation} broadcasts")
    rest = "<>"[:more]
    left, right, out = (x.replace("...", rest) for x in (left, right, out))
    if len({*left}) != len(left) or len({*right}) != len(right) or not {*out} <= {*left, *right}:
        raise Unreadable(f"einsum {equation}")
    return Product(node, a, b, (left, right, out))


def _outer(product: Product) -> tuple[str, str, str]:
    """Letters of what a product contracts, and of the axes that only a or only b has."""
    a, b, out = (set(x) for x in product.letters)
    contracted, of_a, of_b = (a & b) - out, (a - b) & out, (b - a) & out
    if not len(contracted) == len(of_a) == len(of_b) == 1 or a - b - out or b - a - out:
        raise Unreadable(f"a product {product.letters} that is not of rows with rows")
    if len(a & b & out) not in (1, 2):
        raise Unreadable(f"a product with {len(a & b & out)} batch axes")
    return contracted.pop(), of_a.pop(), of_b.pop()


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
    into, of_a, of_b = _outer(second)
    feature = of_b if second.a is weights else of_a
    if into != role["j"] or (of_a if second.a is weights else of_b) != role["i"]:
        raise Unreadable("the product with the values does not sum over the keys")
    second_batch = [role[r] for r in scores.roles if r in "bhp"]
    query, key = first.a, first.b
    q_letters, k_letters = first.letters[:2]
    if letter_i not in q_letters:
        query, key, q_letters, k_letters = key, query, k_letters, q_letters
    fold = _fold(query, q_letters, batch)
    sketch = Sketch(second.node)
    q = _arrange(sketch, query, q_letters, [*batch, letter_i, contracted], fold)
    k = _arrange(sketch, key, k_letters, [*batch, letter_j, contracted], fold)
    v = _arrange(sketch, values, v_letters, [*second_batch, into, feature], fold)
    q, k, v = _one_dtype(sketch, q, k, v)
    mask = _mask(sketch, scores, fold)

    def restore(node: fx.Node) -> fx.Node:
        if fold.swapped:
            node = sketch.call("transpose", node, 0, 1)
        if len(second_batch) == 1:
            node = sketch.call("flatten", node, 0, 1)
        order = [*second_batch, role["i"], feature]
        return _permuted(sketch, node, [order.index(c) for c in second.letters[2]])

    return sketch.attention(
        second.node,
        SPELLING,
        (q, k, v),
        restore,
        mask=mask,
        dropout=scores.dropout,
        scale=scores.scale,
    )


@dataclass(frozen=True)
class Fold:
    """How [B, H] are found: `heads` of a folded axis; `swapped` where heads come first."""

    heads: int = 1
    swapped: bool = False


def _fold(query: fx.Node, letters: str, batch: list[str]) -> Fold:
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


def _arrange(sketch: Sketch, node: fx.Node, letters: str, order: list[str], fold: Fold) -> fx.Node:
    """A tensor as [B, H, N, D], from axes named by `letters`."""
    if sorted(letters) != sorted(order):
        raise Unreadable(f"axes {letters}, expected {''.join(order)}")
    node = _permuted(sketch, node, [letters.index(c) for c in order])
    if len(order) == 3:
        if fold.heads == 0:
            raise Unreadable("the number of heads is not a number")
        if fold.heads == 1:
            return sketch.call("unsqueeze", node, 1)
        sizes = (fold.heads, -1) if fold.swapped else (-1, fold.heads)
        node = sketch.call("unflatten", node, 0, sizes)
    return sketch.call("transpose", node, 0, 1) if fold.swapped else node


def _permuted(sketch: Sketch, node: fx.Node, order: list[int]) -> fx.Node:
    return node if order == sorted(order) else sketch.call("permute", node, *order)


def _dtype(node: fx.Node) -> torch.dtype:
    value = example(node)
    assert isinstance(value, torch.Tensor)
    return value.dtype


def _one_dtype(sketch: Sketch, *nodes: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """All in one dtype. Under autocast a product casts by itself; else the widest loses nothing."""
    dtypes = [_dtype(n) for n in nodes]
    widest = dtypes[0]
    for other in dtypes[1:]:
        widest = torch.promote_types(widest, other)
    target = widest
    if len(set(dtypes)) > 1 and _dtype(sketch.before) in dtypes and _narrow(nodes, sketch.before):
        target = _dtype(sketch.before)
    q, k, v = (n if _dtype(n) == target else sketch.call("to", n, target) for n in nodes)
    return q, k, v


def _narrow(nodes: tuple[fx.Node, ...], out: fx.Node) -> bool:
    """Whether queries and keys have no more digits than the output's dtype holds."""
    target = _dtype(out)
    for node in nodes:
        current: fx.Node = node
        while _dtype(current) != target:
            if short_name(current) not in (*_CASTS, *RESHAPES) and permutation(current) is None:
                return False
            if not current.all_input_nodes:
                return False
            current = current.all_input_nodes[0]
    return True


def _mask(sketch: Sketch, scores: Scores, fold: Fold) -> fx.Node | None:
    result: fx.Node | None = None
    for node, takes_part, fill, at, roles in scores.masks:
        if takes_part is not None and fill * scores.scale / at > _LOW:
            raise Unreadable(f"a mask that fills with {fill}")
        if takes_part is None:
            boolean = keys_that_take_part(sketch, node)
            if boolean is not None:
                node = boolean
        if _dtype(node) == torch.uint8:
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
        node = _permuted(sketch, node, [roles.index(r) for r in "bhij"])
        if same((shape(node) or [1])[-1], 1):
            raise Unreadable("a mask that is the same for all keys")
        if result is None:
            result = node
        elif _dtype(result) == _dtype(node) == torch.bool:
            result = sketch.call(torch.logical_and, result, node)
        else:
            raise Unreadable("several masks that are added to the scores")
    return result


def keys_that_take_part(sketch: Sketch, bias: fx.Node) -> fx.Node | None:
    """The boolean mask behind a bias of zeros and large negative numbers; None if it is none.

    Known: zeros.masked_fill(mask, low), where(mask, 0, low), and (1 - mask) * low.
    """
    name = short_name(bias)
    if name in ("to", "float", "type_as"):
        return keys_that_take_part(sketch, bias.all_input_nodes[0])
    if name == "masked_fill":
        base, mask = bias.args[0], argument(bias, 1, "mask")
        low = number_of(argument(bias, 2, "value"))
        zeros = isinstance(base, fx.Node) and op_name(base) in ("zeros_like", "zeros", "new_zeros")
        lone = isinstance(base, fx.Node) and len(base.users) == 1
        known = zeros and lone and low is not None and low <= _LOW and isinstance(mask, fx.Node)
        if known and _dtype(mask) == torch.bool and shape(mask) == shape(bias):  # type: ignore[arg-type]
            return sketch.call(torch.logical_not, mask)
    if name == "where":
        mask, yes, no = (
            argument(bias, i, n) for i, n in enumerate(("condition", "input", "other"))
        )
        low = number_of(no)
        if number_of(yes) == 0.0 and low is not None and low <= _LOW and isinstance(mask, fx.Node):
            return mask
    if name == "mul" and len(bias.args) == 2:
        low, inner = number_of(bias.args[1]), bias.args[0]
        if low is None:
            low, inner = number_of(bias.args[0]), bias.args[1]
        if low is not None and low <= _LOW and isinstance(inner, fx.Node):
            return _one_minus(inner)
    return None


def _one_minus(node: fx.Node) -> fx.Node | None:
    """m of 1 - m.to(a floating dtype) for a boolean m."""
    if op_name(node) == "rsub":
        one, mask = (node.args[1] if len(node.args) > 1 else None), node.args[0]
    elif short_name(node) == "sub":
        one, mask = node.args[:2]
    else:
        return None
    if number_of(one) != 1.0 or not isinstance(mask, fx.Node) or node.kwargs:
        return None
    while short_name(mask) in _CASTS and _dtype(mask) != torch.bool:
        mask = mask.all_input_nodes[0]
    return mask if _dtype(mask) == torch.bool else None
