"""Pass 2: what each attention call is, by data flow; names of modules are never evidence."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import fx

from fpsc.passes.axes import origin_of
from fpsc.passes.calls import AttentionCall
from fpsc.passes.graph import (
    Dim,
    Program,
    argument,
    is_cat,
    is_convolution,
    is_linear,
    is_parameter,
    op_name,
    same,
    shape,
)
from fpsc.passes.masks import key_padding, mask_problem, outer_product
from fpsc.passes.streams import Segment, Streams, latents

_PROJECTIONS = 100
_PASS_THROUGH = frozenset(["to", "type_as", "float", "dropout", "contiguous", "mul"])


class Role(StrEnum):
    """What an attention call attends over."""

    VIDEO = "video"  # 3D self-attention over the token grid
    JOINT = "joint"  # video and text in one sequence
    CROSS = "cross"  # queries and keys come from different streams
    FRAME = "frame"  # inside frames or along time, folded into the batch
    OTHER = "other"


@dataclass(frozen=True)
class Element:
    """Position `index` of a batch of `batch` elements."""

    index: int
    batch: Dim


@dataclass(frozen=True)
class Candidate:
    """An attention call with what the data flow says of it.

    Attributes:
        role: for self-attention a guess that the grid confirms: `JOINT` when the sequence is a
            concatenation, else `VIDEO`.
        segments: spans of the sequence, in order.
        key_mask: bool node [B, any, any, N] whose first head and query hold for all, or None.
        query_mask: bool node [B, 1, 1, N]: queries that see no key, of which SDPA makes zeros, are
            False; None where there are none.
        element: the batch element that it is for, where elements attend one by one; else None.
        reason: why the call stays dense; "" when it is self-attention that may be replaced.
    """

    call: AttentionCall
    role: Role
    segments: tuple[Segment, ...] = ()
    key_mask: fx.Node | None = None
    query_mask: fx.Node | None = None
    reason: str = ""
    element: Element | None = None


def match(program: Program, calls: list[AttentionCall]) -> list[Candidate]:
    """Classify every attention call of a program."""
    streams = Streams(program, frozenset(call.node for call in calls))
    batch = latent_batch(program)
    return [_classify(streams, call, batch) for call in calls]


def latent_batch(program: Program) -> Dim | None:
    found = latents(program)
    return (shape(found[0]) or [None])[0] if found else None


def _classify(streams: Streams, call: AttentionCall, batch: Dim | None) -> Candidate:
    program = streams.program

    def dense(role: Role, reason: str) -> Candidate:
        return Candidate(call, role, reason=reason)

    if call.query is None or call.key is None or call.value is None or call.unsupported:
        return dense(Role.OTHER, call.unsupported)
    query, key, value = shape(call.query), shape(call.key), shape(call.value)
    assert query is not None and key is not None and value is not None
    sources = projected_from(program, call.query), projected_from(program, call.key)
    if not any(sources) and same(query[2], key[2]):
        return dense(
            Role.VIDEO,
            "queries and keys are made in another graph, so whether they are of one stream cannot "
            "be told: a graph break stands before this attention; torch.compile(..., "
            "fullgraph=True) names it. Hooks on every layer break graphs (leaf-level group "
            "offload, sequential CPU offload): use block-level group offload or model CPU offload",
        )
    if not sources[0] & sources[1]:
        return dense(Role.CROSS, "cross-attention: queries and keys come from different streams")
    if not streams.sizes.same(query[2], key[2]):
        return dense(
            Role.OTHER,
            f"queries and keys differ in length ({query[2]} and {key[2]} tokens); keys of text or "
            "of earlier frames beside the video's own are not supported",
        )
    if batch is None and (merged := _merged_batch(call.query)):
        return dense(
            Role.FRAME, f"batch merged from {merged}: attention inside frames or along time"
        )
    alone = same(query[0], 1) and not (batch is not None and same(batch, 1))
    element = element_of(streams, call, batch) if alone else None
    if batch is not None and not same(query[0], batch) and element is None:
        return dense(
            Role.FRAME,
            f"batch of {query[0]} against {batch} latents: attention inside frames or along time",
        )
    if call.causal:
        return dense(Role.OTHER, "causal attention")
    if call.dropout > 0:
        return dense(Role.OTHER, f"attention dropout {call.dropout}; set it to 0")
    if not same(query[3], value[3]):
        return dense(Role.OTHER, f"head_dim of values ({value[3]}) differs from {query[3]}")
    # SDPA itself sees to it that keys and values are as many: it broadcasts no tokens.
    if not all(map(same, (query[0], *key[:2]), (key[0], *value[:2]))):
        return dense(Role.OTHER, f"queries, keys and values of shapes {query}, {key} and {value}")
    key_mask = query_mask = None
    if call.mask is not None:
        key_mask = key_padding(call.mask)
        if key_mask is None:
            key_mask = query_mask = outer_product(call.mask)
        if key_mask is None:
            return dense(Role.OTHER, mask_problem(call.mask))
    segments = _segments(streams, call.query, query[2])
    role = Role.JOINT if len(segments) > 1 else Role.VIDEO
    return Candidate(call, role, segments, key_mask, query_mask, element=element)


def element_of(streams: Streams, call: AttentionCall, batch: Dim | None) -> Element | None:
    """The batch element that queries, keys and values are all taken from; None if not just one.

    Args:
        batch: number of latents; None where the graph has none.
    """
    program, found = streams.program, set[Element]()
    starts = [side for side in (call.query, call.key, call.value) if side is not None]
    seen, queue = set(starts), list(starts)
    leaves = []
    for node in queue:
        picked = _picked(node)
        if picked is not None and (batch is None or same(picked.batch, batch)):
            found.add(picked)
            continue
        following = program.inputs_of(node)
        if not following and not is_parameter(node):
            leaves.append(node)
        for previous in following:
            if previous not in seen:
                seen.add(previous)
                queue.append(previous)
    if len(found) != 1:
        return None
    element = found.pop()
    whole = [s for leaf in leaves if (s := shape(leaf)) and same(s[0], element.batch)]
    return None if whole or streams.latents & set(leaves) else element


def _picked(node: fx.Node) -> Element | None:
    """The element that `x[b : b + 1]`, `x[b]` or `x.unbind()[b]` takes of a batch."""
    if op_name(node) != "getitem" or not isinstance(source := node.args[0], fx.Node):
        return None
    index, sizes = node.args[1], shape(source)
    first = index[0] if isinstance(index, tuple) and index else index
    if op_name(source) == "unbind" and argument(source, 1, "dim", 0) == 0:
        sizes = shape(source.args[0])
    if isinstance(first, slice):
        one = isinstance(first.start, int) and first.stop == first.start + 1 and first.start >= 0
        first = first.start if one else None
    if not isinstance(first, int) or not sizes or same(sizes[0], 1):
        return None
    if first < 0 and not isinstance(sizes[0], int):
        return None
    return Element(first if first >= 0 else int(sizes[0]) + first, sizes[0])


def _merged_batch(node: fx.Node) -> list[Dim]:
    """The axes that were merged to the batch of a node, behind projections; empty if it is one."""
    for _ in range(_PROJECTIONS):
        origin = origin_of(node, 0)
        if origin is None or origin.kind not in ("origin", "merged"):
            return []
        if origin.kind == "merged":
            sizes = shape(origin.node) or []
            merged = [sizes[axis] for axis in origin.axes]
            return merged if sum(not same(size, 1) for size in merged) > 1 else []
        source = argument(origin.node, 0, "input") if is_linear(origin.node) else None
        if not isinstance(source, fx.Node):
            return []
        node = source
    return []


def projected_from(program: Program, node: fx.Node) -> set[fx.Node]:
    """The activations that the projections (linear or convolution) behind `node` read.

    Only what a projection reads counts: position tables (RoPE) meet queries and keys after it. A
    projection of a projection (a LoRA adapter) counts as one: its outer input is what matters.
    """
    inputs: set[fx.Node] = set()
    seen, queue = {node}, [node]
    for current in queue:
        following = program.inputs_of(current)
        if is_linear(current) or is_convolution(current):
            source = _behind_casts(argument(current, 0, "input"))
            if source is None:
                continue
            if not is_linear(source):
                inputs.add(program.root_of(source))
                continue
            following = [source]
        for previous in following:
            if previous not in seen:
                seen.add(previous)
                queue.append(previous)
    return inputs


def _behind_casts(node: object) -> fx.Node | None:
    while (
        isinstance(node, fx.Node)
        and op_name(node) in _PASS_THROUGH
        and len(node.all_input_nodes) == 1
    ):
        node = node.all_input_nodes[0]
    return node if isinstance(node, fx.Node) else None


def _segments(streams: Streams, query: fx.Node, length: Dim) -> tuple[Segment, ...]:
    """Spans of the sequence that the queries come from, in order.

    They are the operands of the nearest concatenation along the sequence, and of those that
    built the operands. Tables of positions and modulations are concatenated too: where the graph
    has a latent, one of the operands must come from it.
    """
    for node in streams.program.walk_back(query, stop=lambda n: n in streams.attention):
        operands = _concatenated(streams, node, length)
        if operands and streams.holds_video(operands):
            return tuple(s for o in operands for s in _parts(streams, o))
    return (Segment(length, query),)


def _parts(streams: Streams, segment: Segment) -> tuple[Segment, ...]:
    """The segments that a segment was concatenated from, where one of them is video."""
    if streams.latents and streams.is_video(segment.node):
        for node in streams.program.walk_back(segment.node, stop=lambda n: n in streams.attention):
            operands = _concatenated(streams, node, segment.length)
            if len(operands) > 1 and streams.holds_video(operands):
                return tuple(s for o in operands for s in _parts(streams, o))
    return (segment,)


def _concatenated(streams: Streams, node: fx.Node, length: Dim) -> list[Segment]:
    """Operands of a concatenation along the sequence to this length; none if it is not one."""
    sizes = shape(node)
    if not is_cat(node) or sizes is None or len(sizes) not in (3, 4):
        return []
    axis, operands = argument(node, 1, "dim", 0), argument(node, 0, "tensors")
    if not isinstance(axis, int) or not isinstance(operands, list | tuple):
        return []
    axis %= len(sizes)
    if axis == len(sizes) - 1 or not streams.sizes.same(sizes[axis], length):
        return []
    found = []
    for operand in operands:
        part = shape(operand)
        if part is None or not isinstance(operand, fx.Node):
            return []
        if not same(part[axis], 0):  # padding that turned out not to be needed
            found.append(Segment(streams.sizes.of(part[axis]), operand))
    return found
