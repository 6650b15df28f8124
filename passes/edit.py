"""Nodes beside the ones that Dynamo made: how a spelling gets an SDPA call of the same value.

A `Sketch` is a copy of a graph. What is inserted has no users, so that the graph computes what it
did before until `rewrite` makes use of it; what it makes no use of is erased again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from fpsc.passes.calls import AttentionCall
from fpsc.passes.graph import example, memory_of, op_name, shape, writers_of, writes_into

INSERTED = "fpsc_inserted"
"""Key in the meta of inserted nodes."""


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph and of the bodies that it calls; tensors and examples are shared."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(module.graph, copied))
    for old, new in copied.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    for old, new in zip(reversed(module.graph.nodes), reversed(graph.nodes), strict=False):
        new.meta = dict(old.meta)  # of the output node, which `graph_copy` leaves out
        break
    result = fx.GraphModule(module, graph)
    result.meta = module.meta
    for name, child in list(result.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(result, name, copy_module(child))
    return result


class Sketch:
    """Inserts nodes in front of one node of a graph, with their example values."""

    def __init__(self, before: fx.Node) -> None:
        self.before = before
        self.graph = before.graph

    def call(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call of a function, or of the method of that name."""

        def value(argument: Any) -> Any:
            return example(argument) if isinstance(argument, fx.Node) else argument

        given = [fx.node.map_aggregate(a, value) for a in args]
        named = {k: fx.node.map_aggregate(a, value) for k, a in kwargs.items()}
        with torch.no_grad(), _mode_of(given, named):
            if isinstance(target, str):
                result = getattr(given[0], target)(*given[1:], **named)
            else:
                result = target(*given, **named)
        kind = "call_method" if isinstance(target, str) else "call_function"
        with self.graph.inserting_before(self.before):
            node = self.graph.create_node(kind, target, args, kwargs)
        for key in ("nn_module_stack", "stack_trace"):
            if key in self.before.meta:
                node.meta[key] = self.before.meta[key]
        node.meta.update({"example_value": result, INSERTED: True})
        return node

    def item(self, node: fx.Node, index: Any) -> fx.Node:
        """`node[index]`."""
        return self.call(operator.getitem, node, index)

    def attention(
        self,
        node: fx.Node,
        spelling: str,
        qkv: tuple[fx.Node, fx.Node, fx.Node],
        restore: Callable[[fx.Node], fx.Node],
        *,
        mask: fx.Node | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        scale: float | None = None,
    ) -> AttentionCall:
        """An SDPA call of the same value as `node`.

        Args:
            qkv: [B, H, N, D] each.
            restore: inserts what takes [B, H, N, D] back to the layout of `node`.
        """
        named: dict[str, Any] = {"scale": scale}
        if (shape(qkv[0]) or [])[1:2] != (shape(qkv[1]) or [])[1:2]:  # grouped heads
            named["enable_gqa"] = True
        twin = self.call(F.scaled_dot_product_attention, *qkv, mask, dropout, causal, **named)
        restored = restore(twin)
        expected, found = example(node), example(restored)
        assert isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor)
        if expected.dtype != found.dtype:
            restored = self.call("to", restored, expected.dtype)
        if any(user.target == "view" for user in node.users):
            restored = self._laid_out(restored, expected)
        return AttentionCall(
            node, spelling, *qkv, mask, causal, dropout, scale, twin=twin, restored=restored
        )

    def _laid_out(self, node: fx.Node, expected: torch.Tensor) -> fx.Node:
        """In the order in memory of `expected`, on which a `view` was traced."""
        order = sorted(range(expected.ndim), key=expected.stride, reverse=True)
        if order == list(range(expected.ndim)):
            return self.call("contiguous", node)
        inverse = [order.index(i) for i in range(expected.ndim)]
        packed = self.call("contiguous", self.call("permute", node, *order))
        return self.call("permute", packed, *inverse)


def unsupported(node: fx.Node, spelling: str, reason: str) -> AttentionCall:
    """An attention that stays as it is."""
    return AttentionCall(node, spelling, unsupported=reason)


def erase_unused(graph: fx.Graph) -> None:
    """Erase what was inserted and is not used."""
    for node in reversed(list(graph.nodes)):
        if INSERTED in node.meta and not node.users:
            graph.erase_node(node)


def erase_with_sources(node: fx.Node) -> None:
    """Erase a node without users and what only it used, up to what writes in place."""
    queue = [node]
    for current in queue:
        if current.users or current.op not in ("call_function", "call_method"):
            continue
        if str(getattr(current.target, "__name__", current.target)).endswith("_"):
            continue
        sources = list(current.all_input_nodes)
        current.graph.erase_node(current)
        queue += [s for s in sources if s not in queue]


def erase_dead(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase what these nodes were made from and nothing else reads, with what is only written
    into it."""
    queue = list(nodes)
    found = set(queue)
    for node in queue:
        if node.op in ("call_function", "call_method"):
            for other in (*node.all_input_nodes, *writers_of(node)):
                if other not in found:
                    found.add(other)
                    queue.append(other)
    for node in graph.nodes:
        if op_name(node) == "type_as" and node.args[1] in found:
            _name_dtype(node)
    order = list(graph.nodes)
    live = {n for n in order if n not in found or n.op not in ("call_function", "call_method")}
    written = {n: memory_of(n.args[0]) for n in found if _writes(n)}  # type: ignore[arg-type]
    before = -1
    while before != len(live):
        before = len(live)
        memories = {memory_of(n) for n in live}
        for node in reversed(order):
            if node in live:
                continue
            if any(u in live for u in node.users) or written.get(node) in memories:
                live.add(node)
    for node in reversed(order):
        if node not in live:
            graph.erase_node(node)


def _name_dtype(node: fx.Node) -> None:
    """Make `x.type_as(y)` one that does not read y."""
    x, y = node.args
    value = example(y)
    if isinstance(value, torch.Tensor):
        node.target, node.args = "to", (x, value.dtype)


def _writes(node: fx.Node) -> bool:
    target = node.args[0] if node.args else None
    return isinstance(target, fx.Node) and writes_into(node, target)


def _mode_of(*values: Any) -> AbstractContextManager[Any]:
    """The fake mode of example values; while a backend runs, Dynamo's current one is another."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, FakeTensor):
            return leaf.fake_mode
    return nullcontext()
