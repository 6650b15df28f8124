"""Reading of calls in front of an attention: what each does to queries and keys."""

from __future__ import annotations

import torch
from torch import fx

from fpsc.passes.axes import RESHAPES, permutation
from fpsc.passes.before.declined import Declined, require
from fpsc.passes.before.digits import canonical
from fpsc.passes.before.index import Span, items_of
from fpsc.passes.before.matrix import Table
from fpsc.passes.before.norm import Norm, read_norm
from fpsc.passes.before.value import Value
from fpsc.passes.before.writes import assigned, paired
from fpsc.passes.graph import (
    CASTS,
    Dim,
    Program,
    argument,
    dim,
    example,
    is_cat,
    is_convolution,
    is_linear,
    memory_of,
    op_name,
    plain_name,
    same_sizes,
    shape,
    writers_of,
)
from fpsc.passes.sizes import Sizes

_PARTS = frozenset(["unbind", "chunk", "split", "split_with_sizes", "tensor_split"])

_VIEWS = frozenset(
    ["getitem", "view", "unflatten", "transpose", "permute", "unsqueeze", "squeeze", "swapaxes",
     "swapdims", "view_as_real", "view_as_complex"]
)  # fmt: skip
"""Calls whose result is in the memory of their first argument."""

_MAY_SHARE = CASTS | frozenset(
    ["reshape", "flatten", "expand", "repeat", "repeat_interleave", "broadcast_to"]
)
"""Calls whose result may be."""

_EMPTY = frozenset(["empty_like", "empty", "new_empty", "zeros_like", "zeros", "new_zeros"])


class Reader:
    """Values of the nodes in front of one attention.

    Args:
        carrying: what comes from a projection; all else is tables and weights.
        site: the attention; what is written after it does not count.
    """

    def __init__(
        self, program: Program, sizes: Sizes, carrying: set[fx.Node], site: fx.Node
    ) -> None:
        self.order = program.order
        self.sizes = sizes
        self.carrying = carrying
        self.site = site
        self.notes: list[str] = []
        # By how often their memory had been written: views change with it.
        self._known: dict[tuple[fx.Node, int], Value | None] = {}

    def size(self, size: Dim) -> Dim:
        """The same size, one expression for all that are equal."""
        return canonical(self.sizes.of(size))

    def shape(self, node: fx.Node) -> list[Dim]:
        sizes = shape(node)
        if sizes is None:
            raise Declined(f"{op_name(node)} yields no tensor")
        return [self.size(size) for size in sizes]

    def norm(self, node: fx.Node) -> Norm | None:
        """The norm that a node is the result of, if it is one."""
        return read_norm(node, self.carrying)

    def unwritten(self, node: fx.Node, since: fx.Node, until: fx.Node) -> bool:
        """Whether nothing writes into a node's memory between two calls."""
        first, last = self.order[since], self.order[until]
        return not any(first < self.order[w] < last for w in writers_of(memory_of(node)))

    def value(self, node: fx.Node, at: fx.Node) -> Value:
        """The value of a node when `at` reads it.

        Raises: Declined, where its memory is written in a way that is not understood.
        """
        found = self._value(node, at)
        if found is None:
            raise Declined(f"{node.name} is read before it is written")
        return found

    def _value(self, node: fx.Node, at: fx.Node) -> Value | None:
        """None where nothing was written to it yet."""
        now = self.order[at]
        key = (node, sum(self.order[w] < now for w in writers_of(memory_of(node))))
        if key not in self._known:
            value = self._made(node, at)
            for write in sorted(writers_of(node), key=self.order.__getitem__):
                if self.order[write] < now:
                    value = self._checked(node, self._written(value, node, write))
            self._known[key] = value
        return self._known[key]

    def _made(self, node: fx.Node, at: fx.Node) -> Value | None:
        """As its call makes it; a leaf, where that is not understood."""
        if op_name(node) in _EMPTY:
            return None
        leaf = Value.leaf(node, self.shape(node))
        called = node in self.carrying and node.op in ("call_function", "call_method")
        if not called or is_linear(node) or is_convolution(node) or self.norm(node) is not None:
            return leaf
        try:
            return self._checked(node, self._understood(node, at))
        except Declined as error:
            self.notes.append(str(error))
            return leaf

    def _checked(self, node: fx.Node, value: Value) -> Value:
        """A value in place of a node: nothing was widened or became real."""
        alike = value.is_complex == _is_complex(node) and same_sizes(value.sizes, self.shape(node))
        require(alike, f"{op_name(node)} of queries or keys")
        return value

    def _understood(self, node: fx.Node, at: fx.Node) -> Value:
        name, plain = op_name(node), plain_name(node)
        source, *others = node.args or (None,)
        if name in _VIEWS | _MAY_SHARE and isinstance(source, fx.Node):
            if name in _MAY_SHARE:
                unwritten = self.unwritten(source, node, at)
                require(unwritten, f"{source.name} is written in place after {node.name}")
            return self._viewed(node, source, at if name in _VIEWS else node)
        if plain == "neg" and isinstance(source, fx.Node):
            return self.value(source, node).negated()
        two = len(others) == 1 and not node.kwargs
        if plain in ("add", "sub") and two:
            a, b = self._operands(source, others[0], node)
            require({a, b} <= self.carrying, f"{name} with what does not come from a projection")
            second = self.value(b, node)
            return self.value(a, node).plus(second if plain == "add" else second.negated())
        if plain == "mul" and two:
            return self._product(source, others[0], node)
        if name == "stack" or is_cat(node):
            return self._joined(node)
        raise Declined(f"{name} is no part of a norm or a rotation")

    # ---- views

    def _viewed(self, node: fx.Node, source: fx.Node, at: fx.Node) -> Value:
        name = op_name(node)
        if op_name(source) in _PARTS and name == "getitem":
            return self._part(node, source, at)
        value, order = self.value(source, at), permutation(node)
        if order is not None:
            return value.permuted(order)
        if name in RESHAPES or name in ("unsqueeze", "squeeze"):
            return value.reshaped(self.shape(node))
        if name == "getitem":
            return value.indexed(items_of(node.args[1], value.sizes, self.size))
        if name == "view_as_complex":
            return value.as_complex()
        if name == "view_as_real" and value.is_complex:
            return value.as_real()
        return value

    def _part(self, node: fx.Node, source: fx.Node, at: fx.Node) -> Value:
        """What `unbind`, `chunk` or `split` yields at an index."""
        name, index, whole = op_name(source), node.args[1], source.args[0]
        axis, parts = argument(source, 1 if name == "unbind" else 2, "dim", 0), example(source)
        if not isinstance(index, int) or not isinstance(axis, int):
            raise Declined(f"a part of {name}")
        if not isinstance(whole, fx.Node) or not isinstance(parts, list | tuple):
            raise Declined(f"a part of {name}")
        value = self.value(whole, at)
        axis %= len(value.axes)
        if name == "unbind":
            return value.picked(axis, index)
        lengths = [self.size(dim(part.shape[axis])) for part in parts]
        start: Dim = sum(lengths[: index % len(lengths)])
        return value.sliced(axis, Span(canonical(start), canonical(start + lengths[index])))

    # ---- arithmetic

    @staticmethod
    def _operands(a: object, b: object, call: fx.Node) -> tuple[fx.Node, fx.Node]:
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            raise Declined(f"{plain_name(call)} with a number")
        return a, b

    def _product(self, a: object, b: object, call: fx.Node) -> Value:
        """Of queries or keys and a table."""
        x, table = self._operands(a, b, call)
        if x not in self.carrying:
            x, table = table, x
        apart = x in self.carrying and table not in self.carrying
        require(apart, f"{plain_name(call)} of two values that both come from projections")
        value, source = self.value(x, call), table.args[0] if table.args else None
        if op_name(table) == "neg" and isinstance(source, fx.Node):
            table, value = source, value.negated()
        learned = getattr(example(table), "requires_grad", False)
        require(not learned, f"the table {table.name} has a gradient")
        unwritten = not writers_of(memory_of(table))
        require(unwritten, f"the table {table.name} is written in place")
        met = Table(table, self.sizes.value_of(table))
        return value.times(met, self.shape(table), complex=_is_complex(table))

    def _joined(self, node: fx.Node) -> Value:
        operands, axis = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
        if not isinstance(operands, list | tuple) or not isinstance(axis, int):
            raise Declined("a concatenation")
        nodes = [o for o in operands if isinstance(o, fx.Node) and o in self.carrying]
        known = len(nodes) == len(operands)
        require(known, "a concatenation with what does not come from a projection")
        values, sizes = [self.value(o, node) for o in nodes], self.shape(node)
        axis, stacked = axis % len(sizes), op_name(node) == "stack"
        if len(values) == 2 and all(value.is_picked for value in values):
            return paired(values, sizes, axis, stacked=stacked)
        require(not stacked, "a stack of queries or keys")
        return Value.in_a_row(values, axis)

    # ---- writes

    def _written(self, value: Value | None, node: fx.Node, write: fx.Node) -> Value:
        """A value after a call wrote into it, or into a slice of it."""
        target, name = write.args[0], op_name(write)
        assert isinstance(target, fx.Node)
        index: object = Ellipsis
        if target is not node:
            sliced = op_name(target) == "getitem" and target.args[0] is node
            require(sliced, f"{node.name} is written in place through {op_name(target)}")
            index = target.args[1]
        sizes = self.shape(node)
        if name == "addcmul_" and len(write.args) == 3 and not write.kwargs and value is not None:
            old = value.indexed(items_of(index, sizes, self.size))
            new = old.plus(self._product(*write.args[1:], write))
        elif name in ("setitem", "copy_"):
            if name == "setitem":
                require(index is Ellipsis, f"a slice of a slice of {node.name} is written")
                index = write.args[1]
            source = write.args[-1]
            if not isinstance(source, fx.Node) or source not in self.carrying:
                raise Declined(f"{node.name} is overwritten")
            new = self.value(source, write)
        else:
            raise Declined(f"{node.name} is written in place by {name}")
        return assigned(value, sizes, items_of(index, sizes, self.size), new)


def _is_complex(node: fx.Node) -> bool:
    value = example(node)
    return isinstance(value, torch.Tensor) and value.is_complex()
