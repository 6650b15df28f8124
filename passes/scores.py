"""What happens to scores between q k^T and the softmax, and to the weights behind it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from fpsc.passes.axes import RESHAPES, permutation
from fpsc.passes.graph import CASTS, argument, op_name, plain_name, same, same_sizes, shape
from fpsc.passes.masks import number_of
from fpsc.passes.products import Unreadable

_SIDE = frozenset(["amax", "max", "getitem", "detach", "getattr", "logsumexp", "unsqueeze"])


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


def step(scores: Scores, before: fx.Node, node: fx.Node) -> None:
    """What one node between the first product and the softmax does to the scores.

    Raises:
        Unreadable: something that the softmax of scaled and masked scores does not allow.
    """
    name = plain_name(node)
    if _moved(scores, before, node) or name in CASTS:
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
        for source in current.all_input_nodes if plain_name(current) in _SIDE else ():
            if source not in seen:
                seen.add(source)
                queue.append(source)
    return seen


def _beside(node: fx.Node, path_node: fx.Node) -> set[fx.Node]:
    """`node` and what it is made of, up to the scores."""
    return {n for n in _sources(node) if plain_name(n) in _SIDE and n is not path_node}


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
    if plain_name(node) not in RESHAPES:
        return False
    old, new = shape(before), shape(node)
    assert old is not None and new is not None
    if len(old) == len(new) and all(same(a, b) for a, b in zip(old, new, strict=True)):
        return True
    if len(old) == 3 and len(new) == 4 and same_sizes(old[1:], new[2:]) and scores.roles[0] == "p":
        scores.roles = ("b", "h", *scores.roles[1:])
    elif len(old) == 4 and len(new) == 3 and same_sizes(old[2:], new[1:]):
        if scores.roles[:2] != ("b", "h"):
            raise Unreadable("the scores are reshaped")
        scores.roles = ("p", *scores.roles[2:])
    else:
        raise Unreadable(f"the scores are reshaped from {old} to {new}")
    return True


def after_step(scores: Scores, before: fx.Node, node: fx.Node) -> None:
    """What one node between the softmax and the second product does to the weights.

    Raises:
        Unreadable: anything but a dropout, a cast and a view.
    """
    name = plain_name(node)
    if _moved(scores, before, node) or name in CASTS:
        return
    if name != "dropout":
        raise Unreadable(f"{op_name(node)} between the softmax and the product with the values")
    chance, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
    if training and chance != 0:
        scores.dropout = float(chance) if isinstance(chance, int | float) else 1.0
