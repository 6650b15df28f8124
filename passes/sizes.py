"""Sizes that depend on data: which of their symbols are one number, and where they can be read.

`nonzero`, `.item()` and a slice with such a bound get a fresh symbol each, also where the same is
asked of the same tensor again. Two symbols are one where the graph shows it: they count the same
values, or the graph itself asserts that they are equal. In doubt they stay two.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable
from functools import cache

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from fpsc.passes.graph import Body, Dim, Program, dim, example, op_name, same, shape

_PURE = frozenset([
    "getitem", "select", "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze",
    "expand", "permute", "transpose", "t", "contiguous", "to", "bool", "int", "long", "invert",
    "logical_not", "logical_and", "logical_or", "and_", "or_", "not_", "eq", "ne", "sum", "add",
    "sub", "neg", "cat", "ones", "zeros", "new_ones", "new_zeros", "nonzero", "item", "chunk",
    "split", "split_with_sizes", "unbind", "float", "double", "half", "bfloat16", "type_as", "type",
    "real", "imag", "view_as_complex", "view_as_real", "meshgrid",
])  # fmt: skip
"""Calls that give the same for the same arguments; some give a view of one."""

_COMPUTED = _PURE | frozenset([
    "cos", "sin", "arange", "linspace", "outer", "pow", "mul", "truediv", "div", "polar", "stack",
    "repeat", "repeat_interleave", "ones_like", "zeros_like", "embedding",
])  # fmt: skip
"""With what tables of positions are made of."""


class Sizes:
    """Which sizes of a program are equal for every input.

    Args:
        program: only read.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._equal: dict[sympy.Symbol, sympy.Expr] = {}
        self._numbers: dict[Hashable, fx.Node] = {}
        self._number = cache(self._number_of)
        self._is_written = cache(self._tainted)
        self._written = _written(program)
        seen: dict[Hashable, sympy.Symbol] = {}
        known: set[sympy.Symbol] = set()
        for node in program.nodes:
            for axis, symbol in _symbols_of(node):
                if symbol in known:
                    continue
                known.add(symbol)
                if (length := self._cut(node, axis)) is not None:
                    self._equal[symbol] = sympy.sympify(length)
                    continue
                key = self._origin(node, axis)
                if key is not None and seen.setdefault(key, symbol) is not symbol:
                    self._equal[symbol] = seen[key]
            self._asserted(node)

    def of(self, size: Dim) -> Dim:
        """The same size, the same expression for all sizes that are equal."""
        while not isinstance(size, int) and size.free_symbols & self._equal.keys():
            size = size.xreplace(self._equal)
        return int(size) if isinstance(size, sympy.Integer) else size

    def same(self, a: Dim, b: Dim) -> bool:
        """Whether two sizes are equal for every input."""
        return same(self.of(a), self.of(b))

    def value_of(self, node: fx.Node) -> fx.Node:
        """The first node that is known to have the value of this one."""
        return self._number(node)

    def readable(self, body: Body, before: fx.Node) -> dict[sympy.Symbol, tuple[fx.Node, int]]:
        """What tells each symbol inside one body, ahead of a node: a tensor, and its axis.

        Symbols are those of `of`.
        """
        found: dict[sympy.Symbol, tuple[fx.Node, int]] = {}
        for node in body.graph.nodes:
            if node is before:
                break
            sizes = shape(node)
            for axis, size in enumerate(sizes or []):
                size = self.of(size)
                if isinstance(size, sympy.Symbol):
                    found.setdefault(size, (node, axis))
        return found

    # ---- how a symbol comes about

    def _origin(self, node: fx.Node, axis: int | None) -> Hashable | None:
        """What a node's new symbol counts, the same key for the same number; None if unknown."""
        name = op_name(node)
        if axis is None:
            return ("item", self._argument(node.args[0])) if name == "item" else None
        if name == "nonzero" and axis == 0 and len(node.args) == 1:
            return ("true", self._argument(node.args[0]))
        if name != "getitem" or not isinstance(source := node.args[0], fx.Node):
            return None
        given = node.args[1]
        parts = given if isinstance(given, tuple) else (given,)
        sizes = shape(source)
        if sizes is None or axis >= len(parts):
            return None
        if all(isinstance(part, slice) for part in parts):
            part = parts[axis]
            return ("slice", self.of(sizes[axis]), self._argument(part))
        masks = [p for p in parts if isinstance(p, fx.Node)]
        value = example(masks[0]) if len(masks) == 1 else None
        if isinstance(value, torch.Tensor) and value.dtype == torch.bool and parts[0] is masks[0]:
            return ("true", self._argument(masks[0]))
        return None

    def _cut(self, node: fx.Node, axis: int | None) -> Dim | None:
        """Length of `x[:-n]` or `x[-n:]` along an axis; None for anything else.

        That is len(x) - n, or n. With n of 0 the one is empty and the other one is all of x, the
        opposite; joined again they are x either way.
        """
        if axis is None or op_name(node) != "getitem" or not isinstance(node.args[0], fx.Node):
            return None
        given, sizes = node.args[1], shape(node.args[0])
        parts = given if isinstance(given, tuple) else (given,)
        slices = [part for part in parts if isinstance(part, slice)]
        if sizes is None or axis >= len(parts) or len(slices) < len(parts):
            return None
        start, stop = slices[axis].start, slices[axis].stop
        if slices[axis].step is not None or (start is None) == (stop is None):
            return None
        bound = stop if start is None else start
        if not isinstance(bound, fx.Node) or op_name(bound) != "neg":
            return None
        count = -self.of(_scalar(bound))
        return self.of(sizes[axis]) - count if start is None else count

    def _asserted(self, node: fx.Node) -> None:
        """Take an equality that the graph asserts: where it does not hold, the graph fails."""
        condition = node.args[0] if op_name(node) == "_assert_scalar" else None
        if not isinstance(condition, fx.Node) or condition.target is not operator.eq:
            return
        first, second = (self.of(_scalar(a)) for a in condition.args)
        for symbol, other in ((second, first), (first, second)):
            if not isinstance(symbol, sympy.Symbol) or not _is_unbacked(symbol):
                continue
            if symbol not in sympy.sympify(other).free_symbols:
                self._equal[symbol] = sympy.sympify(other)
                return

    # ---- value numbers

    def _number_of(self, node: fx.Node) -> fx.Node:
        """The first node that has the value of this one."""
        node = self.program.root_of(node)
        if op_name(node) not in _COMPUTED or node.op == "placeholder" or self._is_written(node):
            return node
        key = (
            str(node.target),
            tuple(self._argument(a) for a in node.args),
            tuple((k, self._argument(v)) for k, v in sorted(node.kwargs.items())),
        )
        return self._numbers.setdefault(key, node)

    def _argument(self, argument: object) -> Hashable:
        """An argument as a key: equal for equal values."""
        if isinstance(argument, fx.Node):
            value = example(argument)
            if isinstance(value, torch.SymInt):
                return ("size", self.of(dim(value)))
            return ("node", self._number(argument))
        if isinstance(argument, tuple | list):
            return tuple(self._argument(a) for a in argument)
        if isinstance(argument, slice):
            bounds = (argument.start, argument.stop, argument.step)
            return ("slice", *(self._argument(b) for b in bounds))
        return repr(argument)

    def _tainted(self, node: fx.Node) -> bool:
        """Whether a value may share memory with what is written in place."""
        node = self.program.root_of(node)
        if node in self._written:
            return True
        return op_name(node) in _COMPUTED and any(map(self._is_written, node.all_input_nodes))


def _written(program: Program) -> set[fx.Node]:
    """What is written in place, with everything that it is made from by calls that may alias."""
    found: set[fx.Node] = set()
    for node in program.nodes:
        targets = [node.args[0]] if _writes(node) and node.args else []
        queue = [t for t in (*targets, node.kwargs.get("out")) if isinstance(t, fx.Node)]
        for target in queue:
            target = program.root_of(target)
            if target not in found:
                found.add(target)
                queue += target.all_input_nodes if op_name(target) in _PURE else []
    return found


def _writes(node: fx.Node) -> bool:
    """Whether a call writes to its first argument: `copy_`, `setitem`, `+=`."""
    name = op_name(node)
    if getattr(node.target, "__module__", "") == "_operator":
        return name == "setitem" or (name[0] == "i" and hasattr(operator, f"__{name}__"))
    called = node.op in ("call_function", "call_method")
    return called and name.endswith("_") and not name.endswith("__")


def _symbols_of(node: fx.Node) -> list[tuple[int | None, sympy.Symbol]]:
    """Unbacked symbols that a node's value is, or has as a size, with the axis."""
    value = example(node)
    if isinstance(value, torch.SymInt):
        sizes: list[tuple[int | None, Dim]] = [(None, dim(value))]
    else:
        sizes = list(enumerate(shape(node) or []))
    return [(a, s) for a, s in sizes if isinstance(s, sympy.Symbol) and _is_unbacked(s)]


def _is_unbacked(symbol: sympy.Symbol) -> bool:
    return bool(free_unbacked_symbols(symbol))


def _scalar(value: object) -> Dim:
    found = example(value) if isinstance(value, fx.Node) else value
    assert isinstance(found, int | torch.SymInt)
    return dim(found)
