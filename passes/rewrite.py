"""Pass 5: one `fpsc::attention` node for every site, and the inputs that it needs.

The graph is copied, never changed in place: Dynamo goes on using the one it made. New inputs are
appended after the existing ones, and through the bodies of checkpoint regions down to the sites
inside them. The lists of a span whose length only the running graph knows are looked up in it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

import fpsc.kernels.ops
import fpsc.kernels.rows
import fpsc.kernels.spans  # noqa: F401  they register the ops that are inserted here
from fpsc.kernels.before import ACROSS, INTERLEAVED
from fpsc.kernels.kinds import ALL_CELLS
from fpsc.passes.before import Front, RopeTable, Source
from fpsc.passes.edit import Sketch, erase_dead, erase_unused, erase_with_sources
from fpsc.passes.graph import Body, Dim, Program, dim, example, same
from fpsc.passes.infer_grid import Found
from fpsc.passes.match import Candidate
from fpsc.passes.sizes import Sizes
from fpsc.passes.thread import Weight

TABLE = ("cells", "modes")
PLAN = (
    "list_ptr", "list_idx", "back_ptr", "back_idx", "order", "groups", "gather", "valid",
)  # fmt: skip
"""Inputs of the op that a span of video decides, in its order."""
PREFIX = "fpsc_"

STATISTIC_IN_GRAPH = True
"""For measurements: the statistic of a norm across heads is computed by nodes of the graph, which
Inductor compiles, instead of by the op's own kernel."""


@dataclass(frozen=True)
class Target:
    """A site to be replaced: what it is, where its video is, which weight names its layer, and what
    the op does of what is in front of it, or why nothing."""

    candidate: Candidate
    found: Found
    weight: Weight | None
    front: Front | str = "not looked at"


@dataclass
class Rewritten:
    """A rewritten graph and what its caller must add to every call.

    Attributes:
        inputs: names of the inputs that were appended, in order: `edges` or `rows`; `cells`,
            `modes`; and for every span i the names of `PLAN`, as `list_ptr.i`, or `span.i` where
            the graph looks the lists up.
        spans: the different (grid, prefix, suffix) of the sites.
        targets: the sites, in the order of the first axis of `cells`.
        returns_rows: whether the graph returns its noise rows after its own outputs.
    """

    module: fx.GraphModule
    inputs: list[str]
    spans: list[Found]
    targets: list[Target]
    returns_rows: bool


def rewrite(
    program: Program,
    targets: list[Target],
    timestep: fx.Node | None,
    convention: str | None,
    *,
    kinds: int = ALL_CELLS,
    kernel: str = "auto",
    fp8_backward: bool = False,
) -> Rewritten:
    """Replace every target by `fpsc::attention`.

    Args:
        timestep: the input that holds the timestep, or None to take the rows from the caller.
        convention: how a timestep becomes a noise level (`fpsc.kernels.rows`); needed with
            `timestep`.
        kinds, kernel, fp8_backward: of the op; constants of the graph.
    """
    spans: list[Found] = []
    for target in targets:
        if target.found not in spans:
            spans.append(target.found)
    threaded = timestep is not None and convention is not None
    inputs = ["edges" if threaded else "rows", *TABLE]
    for i, span in enumerate(spans):
        inputs += [f"{name}.{i}" for name in (("span",) if span.in_graph else PLAN)]
    shared = threaded and timestep is not None and _rows_example(timestep).shape[0] == 1
    writer = _Writer(program, targets, spans, (kinds, kernel), fp8_backward, shared_row=shared)
    module = writer.copy(program.root, inputs, timestep if threaded else None, convention)
    return Rewritten(module, inputs, spans, targets, returns_rows=threaded)


class _Writer:
    def __init__(
        self,
        program: Program,
        targets: list[Target],
        spans: list[Found],
        structure: tuple[int, str],
        fp8_backward: bool,
        shared_row: bool,
    ) -> None:
        self.program = program
        self.sizes = Sizes(program)
        self.shared_row = shared_row
        self.spans = spans
        self.structure = structure
        self.named = {"fp8_backward": True} if fp8_backward else {}
        self.targets = {t.candidate.call.sdpa: (i, t) for i, t in enumerate(targets)}

    def copy(
        self,
        body: Body,
        inputs: list[str],
        timestep: fx.Node | None = None,
        convention: str | None = None,
    ) -> fx.GraphModule:
        """A copy of one graph with its sites replaced and `inputs` appended."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        result: Any = graph.graph_copy(body.graph, copied)
        placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        # `graph_copy` does not copy the output node, so nodes go where the last placeholder ends.
        anchor = placeholders[-1] if placeholders else graph._root
        values: dict[str, fx.Node] = {}
        for name in inputs:
            with graph.inserting_after(anchor):
                anchor = values[name] = graph.placeholder(PREFIX + name.replace(".", "_"))
        if timestep is not None:
            with graph.inserting_after(anchor):
                values["rows"] = graph.call_function(
                    torch.ops.fpsc.noise_rows.default,
                    (copied[timestep], values["edges"], convention),
                )
                values["rows"].meta["example_value"] = _rows_example(timestep)
        children: dict[str, fx.GraphModule] = {}
        tables: dict[Any, fx.Node] = {}
        replaced: list[fx.Node] = []
        plans: dict[int, list[fx.Node]] = {}
        for original, node in copied.items():
            if original in self.targets:
                span = self.spans.index(self.targets[original][1].found)
                if span not in plans:
                    with graph.inserting_before(node):
                        plans[span] = self._plan(graph, span, original, values, copied)
                if isinstance(self.targets[original][1].front, Front):
                    replaced += node_arguments(node)[:2]
                copied[original] = self._replace(
                    graph, node, original, values, plans[span], copied, tables
                )
        for _, target in self.targets.values():
            written = target.candidate.call
            if written.restored in copied:
                copied[written.node].replace_all_uses_with(copied[written.restored])
                erase_with_sources(copied[written.node])
        for child in self.program.bodies:
            if child.parent is body and self._holds_site(child):
                assert child.call is not None
                names = [n for n in values if n != "edges"]
                children[child.attribute] = self.copy(child, names)
                call = copied[child.call]
                call.args = (*call.args, *[values[n] for n in names])
        if timestep is not None:
            result = (*_as_tuple(result), values["rows"])
        graph.output(result)
        erase_dead(graph, replaced)
        erase_unused(graph)
        module = fx.GraphModule(body.module, graph)
        module.meta = body.module.meta
        for attribute, child_module in children.items():
            setattr(module, attribute, child_module)
        graph.lint()
        return module

    def _holds_site(self, body: Body) -> bool:
        return any(self.program.body_of[node] is body for node in self.targets) or any(
            b.parent is body and self._holds_site(b) for b in self.program.bodies
        )

    def _replace(
        self,
        graph: fx.Graph,
        node: fx.Node,
        original: fx.Node,
        values: dict[str, fx.Node],
        plan: list[fx.Node],
        copied: dict[fx.Node, fx.Node],
        tables: dict[Any, fx.Node],
    ) -> fx.Node:
        site, target = self.targets[original]
        call = target.candidate.call
        query, key, value = node_arguments(node)
        out_example = example(original)
        assert isinstance(out_example, torch.Tensor)
        scale = call.scale if call.scale is not None else _default_scale(out_example)
        named: dict[str, Any] = {}
        if isinstance(target.front, Front):
            query, key, named = self._front(node, original, target.front, copied, tables)
        with graph.inserting_before(node):
            mask = None
            if target.candidate.key_mask is not None:
                mask = _key_mask(graph, target.candidate.key_mask, copied, query)
            both = graph.call_function(
                torch.ops.fpsc.attention.default,
                (
                    query,
                    key,
                    value,
                    self._rows(graph, target.candidate, values["rows"]),
                    values["cells"],
                    values["modes"],
                    *plan,
                    mask,
                    scale,
                    site,
                    *self.structure,
                ),
                named | self.named,
            )
            out = graph.call_function(operator.getitem, (both, 0))
            both.meta.update(_site_meta(original), example_value=(out_example, out_example[..., 0]))
            out.meta.update(_site_meta(original), example_value=out_example)
            if target.candidate.query_mask is not None:
                out = _without_keys(graph, out, copied[target.candidate.query_mask])
                out.meta.update(_site_meta(original), example_value=out_example)
            if out_example.is_contiguous() and any(u.target == "view" for u in node.users):
                # A `view` was traced on [B, H, N, D] memory; ours is [B, N, H, D].
                out = graph.call_method("contiguous", (out,))
                out.meta.update(_site_meta(original), example_value=out_example)
        node.replace_all_uses_with(out)
        graph.erase_node(node)
        return out

    def _plan(
        self,
        graph: fx.Graph,
        index: int,
        original: fx.Node,
        values: dict[str, fx.Node],
        copied: dict[fx.Node, fx.Node],
    ) -> list[fx.Node]:
        """The lists of a span, in the order of `PLAN`."""
        span = self.spans[index]
        if not span.in_graph:
            return [values[f"{name}.{index}"] for name in PLAN]
        prefix, suffix = self._sizes(graph, (span.prefix, span.suffix), original, copied)
        *_, value = node_arguments(copied[original])
        query = example(self.targets[original][1].candidate.call.query)
        assert isinstance(query, torch.Tensor)
        tokens = graph.call_function(torch.ops.aten.sym_size.int, (value, 2))
        given = (values[f"span.{index}"], prefix, suffix, tokens, query.device)
        lists = graph.call_function(torch.ops.fpsc.plan.default, given)
        return [graph.call_function(operator.getitem, (lists, i)) for i in range(len(PLAN))]

    def _sizes(
        self,
        graph: fx.Graph,
        sizes: tuple[Dim, ...],
        original: fx.Node,
        copied: dict[fx.Node, fx.Node],
    ) -> list[int | fx.Node]:
        """Sizes as the running graph knows them, ahead of a site."""
        if all(isinstance(size, int) for size in sizes):
            return list(sizes)  # type: ignore[arg-type]
        readable = self.sizes.readable(self.program.body_of[original], original)
        known = {s: (copied[n], a) for s, (n, a) in readable.items()}
        return [_computed(graph, size, known) for size in sizes]

    def _front(
        self,
        node: fx.Node,
        original: fx.Node,
        front: Front,
        copied: dict[fx.Node, fx.Node],
        tables: dict[Any, fx.Node],
    ) -> tuple[fx.Node, fx.Node, dict[str, Any]]:
        """Queries and keys as the op gets them, and its arguments for what is done to them.

        tables: those of this graph so far, which sites share.
        """
        sketch, named = Sketch(node), dict[str, Any]()
        sides = []
        for letter, sources, heads in zip("qk", (front.query, front.key), front.heads, strict=True):
            joined = _joined(sketch, sources, copied)
            sides.append(_laid_out(sketch, joined, sources[0].order, heads, front.head_dim))
            for name in ("weight", "bias"):
                given = [getattr(source, name) for source in sources]
                if all(given):
                    rows = [copied[g] for g in given]
                    one = rows[0] if len(rows) == 1 else sketch.call(torch.stack, rows)
                    named[f"{letter}_{name}"] = one
            if front.norm == ACROSS and STATISTIC_IN_GRAPH and sources[0].order == "bnc":
                named[f"{letter}_rstd"] = _statistic(sketch, joined, front.epsilon)
        named |= {"norm": front.norm, "epsilon": front.epsilon} if front.norm != "none" else {}
        with node.graph.inserting_before(node):
            begin = 0 if front.rope is None else front.rope.start
            sizes = (front.query[0].length, begin)
            split, start = self._sizes(node.graph, sizes, original, copied)
        if len(front.query) > 1 and "q_weight" in named:
            named["split"] = split
        if (rope := front.rope) is not None:
            named |= {"rotation": rope.rotation, "start": start}
            for name, table in (("cos", rope.cos), ("sin", rope.sin)):
                key = name, table, rope.rotation, rope.negative, rope.every
                if key not in tables:
                    tables[key] = _table(sketch, table, front, copied)
                named[name] = tables[key]
        return sides[0], sides[1], named

    def _rows(self, graph: fx.Graph, candidate: Candidate, rows: fx.Node) -> fx.Node:
        """The rows of the batch elements that an attention is for."""
        if candidate.element is None or self.shared_row:
            return rows
        first = candidate.element.index
        return graph.call_function(operator.getitem, (rows, slice(first, first + 1)))


def _computed(
    graph: fx.Graph, size: Dim, readable: dict[sympy.Symbol, tuple[fx.Node, int]]
) -> int | fx.Node:
    """Nodes that compute a size from the tensors that have its symbols."""
    if isinstance(size, int):
        return size
    tracer = fx.proxy.GraphAppendingTracer(graph)
    symbols = {}
    for symbol in size.free_symbols:
        tensor, axis = readable[symbol]
        node = graph.call_function(torch.ops.aten.sym_size.int, (tensor, axis))
        symbols[symbol] = fx.Proxy(node, tracer)
    found = sympy_interp(PythonReferenceAnalysis, symbols, size)
    return found.node if isinstance(found, fx.Proxy) else int(found)


def _joined(sketch: Sketch, sources: tuple[Source, ...], copied: dict[fx.Node, fx.Node]) -> fx.Node:
    """All tokens of queries or keys, as their projections lay them out."""
    parts = [copied[source.x] for source in sources]
    if len(parts) == 1:
        return parts[0]
    return sketch.call(torch.cat, parts, dim=sources[0].order.index("n"))


def _laid_out(sketch: Sketch, x: fx.Node, order: str, heads: int, head_dim: int) -> fx.Node:
    """[B, H, N, D]"""
    if "c" in order:
        x = sketch.call("unflatten", x, order.index("c"), (heads, head_dim))
        order = order.replace("c", "hd")
    return x if order == "bhnd" else sketch.call("permute", x, *map(order.index, "bhnd"))


def _statistic(sketch: Sketch, x: fx.Node, epsilon: float) -> fx.Node:
    """1 / sqrt(mean(x^2) + epsilon) of every token, float32 [B, N]."""
    square = sketch.call(torch.square, sketch.call("float", x))
    mean = sketch.call(torch.mean, square, dim=-1)
    return sketch.call(torch.rsqrt, sketch.call(operator.add, mean, epsilon))


def _table(sketch: Sketch, use: RopeTable, front: Front, copied: dict[fx.Node, fx.Node]) -> fx.Node:
    """cos or sin as the op takes it, channels side by side."""
    rope, table = front.rope, copied[use.node]
    assert rope is not None
    if use.part:
        table = sketch.call(getattr(torch, use.part), table)
    for axis in reversed(range(len(use.axes))):
        if use.axes[axis] == "":
            table = sketch.call("squeeze", table, axis)
        elif use.axes[axis] == "hd":
            table = sketch.call("unflatten", table, axis, (front.heads[0], -1))
    letters = "".join(use.axes)
    order = [letters.index(letter) for letter in "bhnd" if letter in letters]
    if order != sorted(order):
        table = sketch.call("permute", table, *order)
    for axis, letter in enumerate("bhnd"):
        if letter not in letters:
            table = sketch.call("unsqueeze", table, axis)
    if rope.every:
        half = slice(front.head_dim // 2)
        every = slice(None, None, 2) if rope.rotation == INTERLEAVED else half
        table = sketch.item(table, (Ellipsis, every))
    if rope.negative and use is rope.sin:
        table = sketch.call(torch.neg, table)
    value = example(table)
    assert isinstance(value, torch.Tensor)
    if value.dtype == torch.float64:
        table = sketch.call("float", table)
    return sketch.call("contiguous", table)


def node_arguments(node: fx.Node) -> list[fx.Node]:
    """query, key and value of an SDPA node, however they were passed."""
    named = ("query", "key", "value")
    return [node.args[i] if len(node.args) > i else node.kwargs[n] for i, n in enumerate(named)]  # type: ignore[misc]


def _key_mask(
    graph: fx.Graph, mask: fx.Node, copied: dict[fx.Node, fx.Node], query: fx.Node
) -> fx.Node:
    """[B, N] of a mask [B or 1, any, any, N] that is equal for all heads and queries."""
    flat = graph.call_function(operator.getitem, (copied[mask], (slice(None), 0, 0)))
    value = example(mask)
    assert isinstance(value, torch.Tensor)
    flat.meta["example_value"] = value[:, 0, 0]
    queries = example(query)
    assert isinstance(queries, torch.Tensor)
    if same(dim(value.shape[0]), dim(queries.shape[0])):
        return flat
    batch = graph.call_method("size", (query, 0))
    batch.meta["example_value"] = queries.shape[0]
    expanded = graph.call_method("expand", (flat, batch, -1))
    expanded.meta["example_value"] = value[:, 0, 0].expand(queries.shape[0], -1)
    return expanded


def _without_keys(graph: fx.Graph, out: fx.Node, mask: fx.Node) -> fx.Node:
    """Zeros for queries [B, 1, 1, N] that see no key, as SDPA has it."""
    turned = graph.call_method("transpose", (mask, 2, 3))
    return graph.call_method("masked_fill", (out, graph.call_method("logical_not", (turned,)), 0.0))


def _site_meta(original: fx.Node) -> dict[str, object]:
    return {k: original.meta[k] for k in ("nn_module_stack", "stack_trace") if k in original.meta}


def _default_scale(query: torch.Tensor) -> float:
    return float(int(query.shape[-1])) ** -0.5


def _rows_example(timestep: fx.Node) -> torch.Tensor:
    value = example(timestep)
    assert isinstance(value, torch.Tensor)
    batch = value.shape[0] if value.ndim else 1
    return value.new_empty(batch, dtype=torch.int32)


def _as_tuple(result: Any) -> tuple[Any, ...]:
    return tuple(result) if isinstance(result, list | tuple) else (result,)
