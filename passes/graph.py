"""Reading a Dynamo graph: shapes, sources, in-place writes, and the bodies of checkpoint regions.

A Dynamo graph is not functional: `out[..., 0::2] = x` leaves `x` off the use chain of `out`.
`Program` puts these edges back, and treats the body of a checkpoint region as part of its caller.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from torch import fx

Dim: TypeAlias = "int | sympy.Expr"
"""A size: a number, or an expression over the graph's symbols."""

_VIEWS = frozenset(
    [
        "getitem",
        "slice",
        "select",
        "view",
        "reshape",
        "split_with_sizes",
        "tensor_split",
        "transpose",
        "permute",
        "unsqueeze",
        "squeeze",
        "chunk",
        "split",
        "unbind",
        "unflatten",
        "flatten",
        "expand",
        "narrow",
        "movedim",
        "contiguous",
        "t",
    ]
)
_IN_PLACE = frozenset(["copy_", "mul_", "add_", "fill_", "sub_", "div_"])
_NAMES = {
    "imul": "mul", "mul_": "mul", "multiply": "mul", "__mul__": "mul",
    "truediv": "div", "itruediv": "div", "div_": "div", "true_divide": "div",
    "iadd": "add", "add_": "add", "isub": "sub", "sub_": "sub", "subtract": "sub",
    "masked_fill_": "masked_fill", "dropout_": "dropout",
}  # fmt: skip
_OPERATORS = frozenset(
    [
        operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
        operator.imod, operator.ipow, operator.imatmul, operator.iand, operator.ior, operator.ixor,
    ]
)  # fmt: skip
CASTS = frozenset(
    ["to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone"]
)
"""Calls that keep shape and, but for rounding, value."""
_SHARES = _VIEWS | CASTS | frozenset(
    ["detach", "getattr", "adjoint", "swapaxes", "swapdims", "expand_as", "broadcast_to", "view_as",
     "diagonal", "unfold", "as_strided", "_unsafe_view", "view_as_real", "view_as_complex",
     "int", "long", "bool", "cuda", "cpu"]
)  # fmt: skip
"""Calls whose result may be in the memory of their first argument."""


def op_name(node: fx.Node) -> str:
    """Short name of what a node calls: `linear`, `reshape`, `scaled_dot_product_attention`."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name()
    return getattr(target, "__name__", repr(target))


def plain_name(node: fx.Node) -> str:
    """`op_name`, the same for all ways to write one arithmetic operation."""
    name = op_name(node)
    return _NAMES.get(name, name)


def qualified_name(node: fx.Node) -> str:
    """Name of what a node calls with its namespace, to tell `flash_attn` from `aten`."""
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name()
    module = getattr(target, "__module__", None) or ""
    return f"{module}.{getattr(target, '__name__', repr(target))}"


def example(node: object) -> object:
    """The example value that tracing left on a node, or None."""
    if not isinstance(node, fx.Node):
        return None
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def dim(size: int | torch.SymInt) -> Dim:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_Integer else expression


def shape(node: object) -> list[Dim] | None:
    """Sizes of the tensor that `node` yields, or None if it yields something else."""
    value = example(node)
    return [dim(size) for size in value.shape] if isinstance(value, torch.Tensor) else None


def same(a: Dim, b: Dim) -> bool:
    """Whether two sizes are equal for every value of the symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0


def same_sizes(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


def product(dims: Iterable[Dim]) -> Dim:
    result: Dim = 1
    for size in dims:
        result = result * size
    return result


def fixed(number: object) -> object:
    """A number that dynamic shapes made an input of the graph, with a guard that it is this one."""
    value = example(number)
    return float(value) if isinstance(value, torch.SymFloat) else number


def source_name(node: fx.Node) -> str:
    """Where Dynamo took a placeholder from, e.g. `L['kwargs']['timestep']`; "" when unknown."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        source = getattr(node.meta.get("grapharg"), "source", None)
    if source is None:
        return ""
    name = source.name  # a method up to torch 2.11, a property since
    return name() if callable(name) else name


def is_parameter(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter or a buffer of a module, not an activation."""
    name = source_name(node)
    return (
        "_parameters" in name or "_buffers" in name or isinstance(example(node), torch.nn.Parameter)
    )


def is_linear(node: fx.Node) -> bool:
    """Whether a node multiplies an activation, its first argument, by a weight."""
    return (
        node.op == "call_module"
        or (node.op == "call_function" and op_name(node) in ("linear", "addmm", "mm", "_scaled_mm"))
        or _multiplies_packed_weight(node)
    )


def _multiplies_packed_weight(node: fx.Node) -> bool:
    """Whether a node is a library's own product with a quantised weight.

    Such an operator (of bitsandbytes, for one) takes an activation and a parameter of integers.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace in ("aten", "prims"):
        return False
    activation = example(node.args[0]) if node.args else None
    if not isinstance(activation, torch.Tensor) or not activation.is_floating_point():
        return False
    for source in node.all_input_nodes:
        while op_name(source) in _VIEWS and source.all_input_nodes:
            source = source.all_input_nodes[0]
        value = example(source)
        if source.op == "placeholder" and is_parameter(source) and isinstance(value, torch.Tensor):
            packed = not value.is_floating_point() and not value.is_complex()
            if packed and value.dtype != torch.bool:
                return True
    return False


def is_convolution(node: fx.Node) -> bool:
    return node.op == "call_function" and op_name(node) in (
        "conv1d",
        "conv2d",
        "conv3d",
        "convolution",
    )


def is_cat(node: object) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and op_name(node) in ("cat", "concat", "concatenate")
    )


def argument(node: fx.Node, index: int, name: str, default: object = None) -> object:
    """An argument of a call, whether it was passed by position or by keyword."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def spelled_out(index: object, rank: int) -> list[object]:
    """The items of an index with a full slice for every axis that it leaves out."""
    items = index if isinstance(index, tuple) else (index,)
    if not any(item is Ellipsis for item in items):
        items = (*items, Ellipsis)
    missing = rank - sum(item is not None and item is not Ellipsis for item in items)
    found: list[object] = []
    for item in items:
        found += [slice(None)] * missing if item is Ellipsis else [item]
    return found


def memory_of(node: fx.Node) -> fx.Node:
    """What a value may share its memory with: where the memory was made."""
    while (
        node.op in ("call_function", "call_method")
        and node.args
        and isinstance(node.args[0], fx.Node)
        and (op_name(node) in _SHARES or writes_into(node, node.args[0]))
    ):
        node = node.args[0]
    return node


def writers_of(node: fx.Node) -> list[fx.Node]:
    """Nodes that write in place into a tensor, or into what may share its memory."""
    found: list[fx.Node] = []
    seen, queue = {node}, [node]
    for current in queue:
        for user in current.users:
            if writes_into(user, current):
                found.append(user)
            shares = op_name(user) in _SHARES and user.args[:1] == (current,)
            if (shares or user in found) and user not in seen:
                seen.add(user)
                queue.append(user)
    return list(dict.fromkeys(found))


def writes_into(node: fx.Node, tensor: fx.Node) -> bool:
    """Whether a node writes in place into one of its arguments."""
    if node.kwargs.get("out") is tensor:
        return True
    if node.args[:1] != (tensor,) or node.op not in ("call_function", "call_method"):
        return False
    if node.target is operator.setitem or node.target in _OPERATORS:
        return True
    name = op_name(node)
    pure = name.endswith("__") or node.target in (operator.and_, operator.or_, operator.not_)
    return name.endswith("_") and not pure


def module_path(node: fx.Node) -> str:
    """Path of the module that a node was traced in, e.g. `blocks.0.attn1`; for people only."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    names = re.findall(r"[\w-]+", path.replace("L['self']", ""))
    return ".".join(n for n in names if n not in ("__dict__", "_modules"))


@dataclass
class Body:
    """One graph of a program: the root, or the body of a checkpoint region.

    `call` is the node that runs the body in `parent`; `bound` maps the body's placeholders to the
    operands of that call.
    """

    module: fx.GraphModule
    parent: Body | None = None
    call: fx.Node | None = None
    attribute: str = ""

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph


class Program:
    """All graphs that run when a Dynamo graph runs, as one data flow.

    Args:
        module: the graph that Dynamo hands to a backend. It is only read.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        self.root = Body(module)
        self.bodies: list[Body] = []
        self.body_of: dict[fx.Node, Body] = {}
        self._bound: dict[fx.Node, fx.Node] = {}
        self._results: dict[fx.Node, list[fx.Node]] = {}
        self._writes: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        self._enter(self.root)
        self.nodes = list(self.body_of)
        self.order = {node: position for position, node in enumerate(self.nodes)}

    def _enter(self, body: Body) -> None:
        self.bodies.append(body)
        for node in body.graph.nodes:
            self.body_of[node] = body
            if node.op == "call_function" and node.target is operator.setitem:
                self._record_write(node.args[0], node.args[2])
            elif op_name(node) in _IN_PLACE and node.op in ("call_function", "call_method"):
                for value in node.args[1:]:
                    self._record_write(node.args[0], value)
            inner = self._region(body, node)
            if inner is not None:
                operands = [a for a in node.args if isinstance(a, fx.Node)][1:]
                placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
                if len(operands) == len(placeholders):
                    self._bound.update(zip(placeholders, operands, strict=True))
                self._enter(inner)
                output = next(n for n in inner.graph.nodes if n.op == "output")
                self._results[node] = list(output.all_input_nodes)

    @staticmethod
    def _region(body: Body, node: fx.Node) -> Body | None:
        """The checkpoint body that `node` runs, if it runs one."""
        target = node.target
        if not isinstance(target, torch._ops.HigherOrderOperator) or "flex" in target.name():
            return None
        if not node.args or not isinstance(node.args[0], fx.Node) or node.args[0].op != "get_attr":
            return None
        name = str(node.args[0].target)
        inner = getattr(body.module, name, None)
        return Body(inner, body, node, name) if isinstance(inner, fx.GraphModule) else None

    def _record_write(self, target: object, value: object) -> None:
        """`target` and everything it is a view of now also depend on `value`."""
        if not isinstance(value, fx.Node):
            return
        while isinstance(target, fx.Node):
            self._writes[target].append(value)
            if op_name(target) not in _VIEWS or not target.args:
                return
            target = target.args[0]

    @property
    def placeholders(self) -> list[fx.Node]:
        """Inputs of the root graph, in order."""
        return [n for n in self.root.graph.nodes if n.op == "placeholder"]

    def inputs_of(self, node: fx.Node) -> list[fx.Node]:
        """Everything that `node` reads, with in-place writes and across region boundaries."""
        found = list(node.all_input_nodes) + self._writes.get(node, [])
        if node in self._bound:
            found.append(self._bound[node])
        return found + self._results.get(node, [])

    def walk_back(
        self, start: fx.Node, stop: Callable[[fx.Node], bool] = lambda node: False
    ) -> Iterator[fx.Node]:
        """Breadth-first over all that `start` depends on; does not go past nodes that `stop`.

        `start` itself comes first and is never a stop.
        """
        seen, queue = {start}, [start]
        for node in queue:
            yield node
            if node is not start and stop(node):
                continue
            for previous in self.inputs_of(node):
                if previous not in seen:
                    seen.add(previous)
                    queue.append(previous)

    def root_of(self, node: fx.Node) -> fx.Node:
        """What a placeholder of a checkpoint body stands for, at the outermost level."""
        while node in self._bound:
            node = self._bound[node]
        return node
