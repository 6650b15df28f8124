"""A matrix product in any of its spellings, as an einsum of two tensors."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fpsc.passes.graph import argument, op_name, same_sizes, shape

PRODUCTS = frozenset(["matmul", "bmm", "baddbmm", "einsum", "__matmul__", "imatmul"])


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


def read_product(node: fx.Node) -> Product:
    """The product that a node computes.

    Raises:
        Unreadable: it is not one of two tensors of the graph, or it broadcasts.
    """
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
    if not same_sizes(first[:-2], second[:-2]):
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


def outer_letters(product: Product) -> tuple[str, str, str]:
    """Letters of what a product contracts, and of the axes that only a or only b has.

    Raises:
        Unreadable: it is not a product of rows with rows in one or two batch axes.
    """
    a, b, out = (set(x) for x in product.letters)
    contracted, of_a, of_b = (a & b) - out, (a - b) & out, (b - a) & out
    if not len(contracted) == len(of_a) == len(of_b) == 1 or a - b - out or b - a - out:
        raise Unreadable(f"a product {product.letters} that is not of rows with rows")
    if len(a & b & out) not in (1, 2):
        raise Unreadable(f"a product with {len(a & b & out)} batch axes")
    return contracted.pop(), of_a.pop(), of_b.pop()
